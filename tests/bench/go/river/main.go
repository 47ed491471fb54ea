// River on PostgreSQL, with what its own benchmark command uses: 2,000 workers, a fetch cooldown of 2 ms;
// InsertManyFast (COPY) for many jobs.
package main

import (
	"context"
	"log/slog"
	"os"
	"strconv"
	"time"

	"bench/protocol"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

type Args struct{ protocol.Task }

func (Args) Kind() string { return "handle" }

type Handler struct {
	river.WorkerDefaults[Args]
	record *protocol.Record
}

func (h *Handler) Work(_ context.Context, job *river.Job[Args]) error {
	h.record.Add(job.Args.ID)
	return nil
}

func main() {
	background := context.Background()
	pool := must(pgxpool.New(background, os.Args[2]+"?pool_max_conns=20"))
	driver := riverpgxv5.New(pool)
	quiet := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if os.Args[1] == "produce" {
		must(must(rivermigrate.New(driver, nil)).Migrate(background, rivermigrate.DirectionUp, nil))
		produce(background, pool, must(river.NewClient(driver, &river.Config{Logger: quiet})))
		return
	}
	workers := river.NewWorkers()
	river.AddWorker(workers, &Handler{record: protocol.NewRecord(must(strconv.Atoi(os.Args[4])), os.Args[5])})
	queue := river.QueueConfig{MaxWorkers: 2_000, FetchCooldown: 2 * time.Millisecond, FetchPollInterval: 20 * time.Millisecond}
	queues := map[string]river.QueueConfig{os.Args[3]: queue}
	client := must(river.NewClient(driver, &river.Config{Logger: quiet, Queues: queues, Workers: workers}))
	if err := client.Start(background); err != nil {
		panic(err)
	}
	protocol.Say(map[string]any{"event": "ready"})
	select {}
}

func produce(background context.Context, pool *pgxpool.Pool, client *river.Client[pgx.Tx]) {
	insert := func(queue string, number int) error {
		_, err := client.Insert(background, Args{protocol.NewTask(number)}, &river.InsertOpts{Queue: queue})
		return err
	}
	many := func(queue string, at, end int) error {
		rows := make([]river.InsertManyParams, 0, end-at)
		for ; at < end; at++ {
			args := Args{protocol.NewTask(at)}
			rows = append(rows, river.InsertManyParams{Args: args, InsertOpts: &river.InsertOpts{Queue: queue}})
		}
		_, err := client.InsertManyFast(background, rows)
		return err
	}
	protocol.Produce(map[string]func(protocol.Command) (map[string]any, error){
		"enqueue": func(c protocol.Command) (map[string]any, error) {
			if c.Mode == "bulk" {
				send := func(at, end int) error { return many(c.Queue, at, end) }
				return protocol.Share(c.First, c.Count, protocol.Bulk, 4, send)
			}
			loops := map[string]int{"one": 1, "pipelined": protocol.Window}[c.Mode]
			return protocol.Share(c.First, c.Count, 1, loops, func(at, _ int) error { return insert(c.Queue, at) })
		},
		"open": func(c protocol.Command) (map[string]any, error) {
			return protocol.WhenDue(c.Times, func(number int) error { return insert(c.Queue, number) })
		},
		"left": func(c protocol.Command) (map[string]any, error) {
			var left int
			sql := "select count(*) from river_job where queue = $1 and state not in ('completed', 'cancelled')"
			err := pool.QueryRow(background, sql, c.Queue).Scan(&left)
			return map[string]any{"left": left}, err
		},
	})
}

func must[T any](found T, err error) T {
	if err != nil {
		panic(err)
	}
	return found
}
