package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"retinue/client"
	pb "retinue/workqueue/v1"
)

// The server is a real one: RETINUE_ADDRESS is where apps dial it, RETINUE_CONTROL_ADDRESS where operators do.

type bench struct {
	*testing.T
	tasks pb.WorkQueueServiceClient // the worker's, whose connections a test can cut
	apart pb.WorkQueueServiceClient // the test's own
	admin pb.WorkQueueAdminServiceClient
	queue string
	links *links
	log   bytes.Buffer // what the worker complained of; to be read when it ended
}

func newBench(t *testing.T) *bench {
	if os.Getenv("RETINUE_ADDRESS") == "" || os.Getenv("RETINUE_CONTROL_ADDRESS") == "" {
		t.Fatal("cannot test: set RETINUE_ADDRESS and RETINUE_CONTROL_ADDRESS to those of a running server")
	}
	links := &links{}
	channel, err := client.Dial("workqueue", grpc.WithContextDialer(links.dial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { channel.Close() })
	control, err := grpc.NewClient(os.Getenv("RETINUE_CONTROL_ADDRESS"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	queue := fmt.Sprintf("go-%s-%d", t.Name(), time.Now().UnixNano())
	tasks, apart := pb.NewWorkQueueServiceClient(channel), pb.NewWorkQueueServiceClient(control)
	admin := pb.NewWorkQueueAdminServiceClient(control)
	return &bench{T: t, tasks: tasks, apart: apart, admin: admin, queue: queue, links: links}
}

// links are the connections that a channel made, so that a test can cut them.
type links struct {
	sync.Mutex
	open []net.Conn
	dead bool
}

func (l *links) dial(ctx context.Context, address string) (net.Conn, error) {
	l.Lock()
	dead := l.dead
	l.Unlock()
	if dead {
		return nil, net.ErrClosed
	}
	connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err == nil {
		l.Lock()
		l.open = append(l.open, connection)
		l.Unlock()
	}
	return connection, err
}

func (l *links) cut() {
	l.Lock()
	defer l.Unlock()
	for _, connection := range l.open {
		connection.Close()
	}
	l.open = nil
}

// die cuts them for good.
func (l *links) die() {
	l.Lock()
	l.dead = true
	l.Unlock()
	l.cut()
}

func (b *bench) enqueue() string {
	request := &pb.EnqueueTasksRequest{Tasks: []*pb.TaskSpec{{QueueId: b.queue}}}
	response, err := b.apart.EnqueueTasks(b.Context(), request)
	if err != nil {
		b.Fatal(err)
	}
	return response.Results[0].TaskId
}

func (b *bench) ended(id string) *pb.Task {
	request := &pb.WaitTaskRequest{TaskId: id, WaitDuration: durationpb.New(60 * time.Second)}
	response, err := b.apart.WaitTask(b.Context(), request)
	if err != nil {
		b.Fatal(err)
	}
	return response.Task
}

// run starts a worker with short leases; the returned function stops it and gives what Run returned.
func (b *bench) run(handle client.Handler) (stop func() error) {
	ctx, cancel := context.WithCancel(b.Context())
	worker := &client.Worker{
		Client: b.tasks, Queue: b.queue, Handle: handle, LeaseDuration: 3 * time.Second, Grace: 3 * time.Second,
		Log: slog.New(slog.NewTextHandler(&b.log, nil)),
	}
	over := make(chan error, 1)
	go func() { over <- worker.Run(ctx) }()
	return func() error { cancel(); return <-over }
}

func (b *bench) expect(what string, got, want any) {
	b.Helper()
	expect(b, what, got, want)
}

func untilDone(ctx context.Context, causes chan<- error) (client.Result, error) {
	<-ctx.Done()
	causes <- context.Cause(ctx)
	return client.Result{}, context.Cause(ctx)
}

func TestATaskThatOutlivesItsLeaseIsRenewed(t *testing.T) {
	b := newBench(t)
	id := b.enqueue()
	stop := b.run(func(context.Context, *pb.Lease) (client.Result, error) {
		time.Sleep(7 * time.Second)
		return client.Result{Payload: client.Text("late")}, nil
	})
	task := b.ended(id)
	b.expect("its state", task.State, pb.TaskState_TASK_STATE_SUCCEEDED)
	b.expect("its expired leases", task.LeaseExpirations, int32(0))
	b.expect("its epoch", task.LeaseEpoch, int64(1))
	b.expect("the worker's end", stop(), nil)
	b.expect("its log", b.log.String(), "") // the stream did not break, either
}

func TestACancelledTaskStopsItsHandler(t *testing.T) {
	b := newBench(t)
	id := b.enqueue()
	begun, causes := make(chan bool, 1), make(chan error, 1)
	stop := b.run(func(ctx context.Context, _ *pb.Lease) (client.Result, error) {
		begun <- true
		return untilDone(ctx, causes)
	})
	<-begun
	if _, err := b.apart.CancelTasks(t.Context(), &pb.CancelTasksRequest{TaskIds: []string{id}}); err != nil {
		t.Fatal(err)
	}
	b.expect("the cause", <-causes, client.ErrCancelled)
	b.expect("its state", b.ended(id).State, pb.TaskState_TASK_STATE_CANCELLED)
	b.expect("the worker's end", stop(), nil)
}

func TestALostLeaseStopsItsHandler(t *testing.T) {
	b := newBench(t)
	b.enqueue()
	begun, causes := make(chan bool, 1), make(chan error, 1)
	stop := b.run(func(ctx context.Context, _ *pb.Lease) (client.Result, error) {
		begun <- true
		return untilDone(ctx, causes)
	})
	<-begun
	if _, err := b.admin.DeleteQueue(t.Context(), &pb.DeleteQueueRequest{QueueId: b.queue, Force: true}); err != nil {
		t.Fatal(err)
	}
	b.expect("the cause", <-causes, client.ErrLeaseLost)
	b.expect("the worker's end", stop(), nil)
}

func TestAnOutcomeSurvivesItsStream(t *testing.T) {
	b := newBench(t)
	id := b.enqueue()
	stop := b.run(func(context.Context, *pb.Lease) (client.Result, error) {
		time.Sleep(200 * time.Millisecond) // a lease whose delivery the cut interrupts goes back at once
		b.links.cut()
		time.Sleep(4500 * time.Millisecond) // longer than the lease: it is renewed without its stream
		return client.Result{Payload: client.Text("after the cut")}, nil
	})
	task := b.ended(id)
	b.expect("its state", task.State, pb.TaskState_TASK_STATE_SUCCEEDED)
	b.expect("its epoch", task.LeaseEpoch, int64(1))
	second := b.enqueue()
	b.expect("the next one's state", b.ended(second).State, pb.TaskState_TASK_STATE_SUCCEEDED)
	b.expect("the worker's end", stop(), nil)
}

func TestAStoppingWorkerLetsItsHandlerFinish(t *testing.T) {
	b := newBench(t)
	id := b.enqueue()
	begun := make(chan bool, 1)
	stop := b.run(func(context.Context, *pb.Lease) (client.Result, error) {
		begun <- true
		time.Sleep(300 * time.Millisecond)
		return client.Result{}, nil
	})
	<-begun
	b.expect("the worker's end", stop(), nil)
	b.expect("its state", b.ended(id).State, pb.TaskState_TASK_STATE_SUCCEEDED)
}

func TestAfterTheGraceTheTaskGoesBack(t *testing.T) {
	b := newBench(t)
	id := b.enqueue()
	begun, causes := make(chan bool, 1), make(chan error, 1)
	stop := b.run(func(ctx context.Context, _ *pb.Lease) (client.Result, error) {
		begun <- true
		return untilDone(ctx, causes)
	})
	<-begun
	b.expect("the worker's end", stop(), nil)
	b.expect("the cause", <-causes, client.ErrStopping)
	response, err := b.apart.GetTask(t.Context(), &pb.GetTaskRequest{TaskId: id})
	if err != nil {
		t.Fatal(err)
	}
	b.expect("its state", response.Task.State, pb.TaskState_TASK_STATE_READY)
	b.expect("its attempts", response.Task.Attempt, int32(0))
}

func TestAResultThatIsRefusedFailsTheTask(t *testing.T) {
	spaces := []*pb.TaskSpec{{QueueId: "no spaces, please"}}
	for reason, result := range map[string]client.Result{
		"PAYLOAD_TOO_LARGE": {Payload: client.Text(strings.Repeat("x", 300<<10))},
		"INVALID_FIELD":     {FollowUps: spaces},
	} {
		t.Run(reason, func(t *testing.T) {
			b := newBench(t)
			b.queue = strings.ReplaceAll(b.queue, "/", "-")
			id := b.enqueue()
			stop := b.run(func(context.Context, *pb.Lease) (client.Result, error) { return result, nil })
			task := b.ended(id)
			b.expect("its state", task.State, pb.TaskState_TASK_STATE_DEAD)
			b.expect("why", task.LastFailure.GetReason(), reason)
			b.expect("the worker's end", stop(), nil)
		})
	}
}

func TestAFinalFailureEndsTheTaskAndAReleaseDoesNotCount(t *testing.T) {
	b := newBench(t)
	id := b.enqueue()
	first := true
	stop := b.run(func(_ context.Context, lease *pb.Lease) (client.Result, error) {
		b.expect("the attempt", lease.Attempt, int32(1))
		if first {
			first = false
			return client.Result{}, fmt.Errorf("not mine: %w", client.ErrRelease)
		}
		return client.Result{}, &client.Failure{Reason: "BROKEN", Message: strings.Repeat("é", 5000), Final: true}
	})
	task := b.ended(id)
	b.expect("its state", task.State, pb.TaskState_TASK_STATE_DEAD)
	b.expect("why", task.LastFailure.GetReason(), "BROKEN")
	b.expect("its epoch", task.LeaseEpoch, int64(2))
	b.expect("the worker's end", stop(), nil)
}

func TestAWorkerThatCanNeverWorkSaysSo(t *testing.T) {
	b := newBench(t)
	b.queue = "no spaces, please"
	worker := &client.Worker{Client: b.tasks, Queue: b.queue}
	var refusal *client.Error
	if err := worker.Run(t.Context()); !errors.As(err, &refusal) {
		t.Fatalf("it ended with %v", err)
	}
	b.expect("the reason", refusal.Reason, "INVALID_FIELD")
}
