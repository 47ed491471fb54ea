// Faktory with its Go worker at its documented concurrency of 20, connections pooled to match; PUSHB for many jobs.
package main

import (
	"context"
	"log"
	"os"
	"strconv"

	"bench/protocol"

	faktory "github.com/contribsys/faktory/client"
	worker "github.com/contribsys/faktory_worker_go"
)

const connections = 20

func main() {
	log.SetOutput(os.Stderr)
	os.Setenv("FAKTORY_URL", os.Args[2])
	if os.Args[1] == "produce" {
		produce(must(faktory.NewPool(protocol.Window)))
		return
	}
	record := protocol.NewRecord(must(strconv.Atoi(os.Args[4])), os.Args[5])
	manager := worker.NewManager()
	manager.Concurrency = connections
	manager.Register("handle", func(_ context.Context, args ...any) error {
		record.Add(int(args[0].(map[string]any)["id"].(float64)))
		return nil
	})
	manager.ProcessStrictPriorityQueues(os.Args[3])
	protocol.Say(map[string]any{"event": "ready"})
	manager.Run()
}

func produce(pool *faktory.Pool) {
	job := func(queue string, number int) *faktory.Job {
		made := faktory.NewJob("handle", protocol.NewTask(number))
		made.Queue = queue
		return made
	}
	push := func(queue string, at, end int) error {
		return pool.With(func(client *faktory.Client) error {
			if end == at+1 {
				return client.Push(job(queue, at))
			}
			jobs := make([]*faktory.Job, 0, end-at)
			for ; at < end; at++ {
				jobs = append(jobs, job(queue, at))
			}
			_, err := client.PushBulk(jobs)
			return err
		})
	}
	protocol.Produce(map[string]func(protocol.Command) (map[string]any, error){
		"enqueue": func(c protocol.Command) (map[string]any, error) {
			step := map[string]int{"bulk": protocol.Bulk, "one": 1, "pipelined": 1}[c.Mode]
			loops := map[string]int{"bulk": 4, "one": 1, "pipelined": protocol.Window}[c.Mode]
			send := func(at, end int) error { return push(c.Queue, at, end) }
			return protocol.Share(c.First, c.Count, step, loops, send)
		},
		"open": func(c protocol.Command) (map[string]any, error) {
			return protocol.WhenDue(c.Times, func(number int) error { return push(c.Queue, number, number+1) })
		},
		"left": func(c protocol.Command) (map[string]any, error) {
			var left uint64
			err := pool.With(func(client *faktory.Client) error {
				state, err := client.CurrentState()
				if err == nil {
					left = state.Data.Queues[c.Queue] + state.Data.Sets["working"]
				}
				return err
			})
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
