// A worker of the Go client that writes a history (tests/support/history), until SIGTERM.
// In clients/go: go build -o worker ../../tests/faults/clients/*.go
package main

import (
	"context"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"log"
	"log/slog"
	"math/rand"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"retinue/client"
	pb "retinue/workqueue/v1"
)

const followUp = "follow-up"

func main() {
	queue := flag.String("queue", "", "the queue")
	name := flag.String("name", "", "unique in the history")
	directory := flag.String("history", "", "a directory")
	seed := flag.String("seed", "0", "decides what becomes of each lease")
	hands := flag.Int("threads", 50, "how many tasks at a time")
	lease := flag.Float64("lease", 1.5, "seconds")
	hold := flag.Float64("hold", -1, "seconds: complete all, after so long")
	flag.Parse()
	record, err := open(*directory, *name)
	if err != nil {
		log.Fatal(err)
	}
	quick := grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 200 * time.Millisecond},
		MinConnectTimeout: 500 * time.Millisecond,
	}
	channel, err := client.Dial("workqueue", grpc.WithConnectParams(quick),
		grpc.WithUnaryInterceptor(record.unary), grpc.WithStreamInterceptor(record.stream))
	if err != nil {
		log.Fatal(err)
	}
	worker := &client.Worker{
		Client: pb.NewWorkQueueServiceClient(channel), Queue: *queue, ID: *name, Concurrency: *hands,
		LeaseDuration: time.Duration(*lease * float64(time.Second)), Grace: 2 * time.Second,
		Handle: handler(*seed), Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	if *hold >= 0 {
		worker.Handle = holder(time.Duration(*hold * float64(time.Second)))
	}
	told, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := worker.Run(told); err != nil {
		log.Fatal(err)
	}
}

// handler does with a lease what the seed, the task and the epoch say.
func handler(seed string) client.Handler {
	return func(ctx context.Context, lease *pb.Lease) (client.Result, error) {
		hash := fnv.New64()
		fmt.Fprintf(hash, "%s/%s/%d", seed, lease.TaskId, lease.LeaseEpoch) // a hash takes all that it is given
		chance := rand.New(rand.NewSource(int64(hash.Sum64())))
		switch drawn := chance.Float64() * 100; {
		case drawn < 5:
			return client.Result{}, &client.Failure{Reason: "PLANNED", Message: "as the seed says"}
		case drawn < 5.5:
			return client.Result{}, &client.Failure{Reason: "PLANNED", Message: "as the seed says", Final: true}
		case drawn < 9:
			return client.Result{}, client.ErrRelease
		case drawn < 11: // long enough to live on renewals
			wait(ctx, time.Duration(chance.Float64()*3*float64(time.Second)))
		}
		result := client.Result{Payload: client.Text(strconv.FormatInt(lease.LeaseEpoch, 10))}
		if lease.TaskType != followUp && chance.Float64() < 0.3 {
			labels := map[string]string{"epoch": strconv.FormatInt(lease.LeaseEpoch, 10)}
			result.FollowUps = []*pb.TaskSpec{{QueueId: lease.QueueId, TaskType: followUp, Labels: labels}}
		}
		return result, nil
	}
}

// holder completes every lease after a while.
func holder(hold time.Duration) client.Handler {
	return func(ctx context.Context, _ *pb.Lease) (client.Result, error) {
		wait(ctx, hold)
		return client.Result{}, nil
	}
}

func wait(ctx context.Context, long time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(long):
	}
}
