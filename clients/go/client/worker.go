package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	workqueuev1 "retinue/workqueue/v1"
)

var (
	// ErrLeaseLost is the cause of a handler's context when the task is no longer this worker's: publish nothing.
	ErrLeaseLost = errors.New("cannot go on: the lease was lost")
	// ErrCancelled is the cause of a handler's context when the task was cancelled.
	ErrCancelled = errors.New("cannot go on: the task was cancelled")
	// ErrStopping is the cause of a handler's context when the worker's grace is over.
	ErrStopping = errors.New("cannot go on: the worker is stopping")
	// ErrRelease, wrapped in a handler's error, gives the task back: the attempt is not counted.
	ErrRelease = errors.New("released")
)

const (
	firstWait, longestWait = 50 * time.Millisecond, 2 * time.Second
	longestRenewal         = 10 * time.Second // an answer is asked for that often, so that a dead server shows
	lastWords              = 5 * time.Second  // for outcomes that come at the end of the grace
	callTimeout            = 10 * time.Second
)

// Failure is a handler's error that says more than its text: a word for programs, and whether no other attempt can help.
type Failure struct {
	Reason, Message string
	Final           bool
}

func (f *Failure) Error() string { return f.Reason + ": " + f.Message }

// Result is what a handler gives back: committed with its follow-ups, or not at all.
type Result struct {
	Payload   *workqueuev1.Payload
	FollowUps []*workqueuev1.TaskSpec
}

// Handler does one task.
//
// It must return soon after its context is done. A result without an error completes the task; after ErrCancelled or
// ErrStopping an error gives it back. An error that is no *Failure and wraps no ErrRelease is a failure that another
// attempt may mend.
type Handler func(ctx context.Context, lease *workqueuev1.Lease) (Result, error)

// Worker does the tasks of one queue over a StreamTasks stream: it renews leases at a third of their duration, cancels the
// handler of a lost one, reconnects, and settles by calls what a broken stream left behind.
type Worker struct {
	// Client is the server. Required.
	Client workqueuev1.WorkQueueServiceClient
	// Queue is the queue's name. Required.
	Queue string
	// Handle does one task. Required.
	Handle Handler
	// ID names the process, for people; by default it is made of host name, process id and something random.
	ID string
	// Concurrency is how many tasks are worked on at a time, up to 10,000, by default 1.
	Concurrency int
	// LeaseDuration is how long leases last, 1 s to 12 h, by default what the queue says.
	LeaseDuration time.Duration
	// Grace is how long handlers may go on after the worker was told to stop, by default 30 s.
	Grace time.Duration
	// Log gets lost leases, refused outcomes and broken streams; by default slog.Default().
	Log *slog.Logger

	life     context.Context // ends when nothing more may be sent
	soft     context.Context // ends with the grace
	handlers sync.WaitGroup
	mu       sync.Mutex
	session  *session // the stream that gets credit; nil while there is none
	busy     int      // leases that are not settled
	promised int      // credit that the session was given and has not used
}

// Run works until ctx is done; then it takes no more tasks, gives handlers the grace to finish, settles, and returns nil.
// It returns an error only where trying again can't help, such as a missing right. A Worker runs once.
func (w *Worker) Run(ctx context.Context) error {
	w.setDefaults()
	running, stop := context.WithCancel(ctx)
	life, end := context.WithCancelCause(context.WithoutCancel(ctx))
	soft, soften := context.WithCancelCause(life)
	defer end(nil)
	w.life, w.soft = life, soft
	context.AfterFunc(running, func() {
		time.AfterFunc(w.Grace, func() { soften(ErrStopping) })
		time.AfterFunc(w.Grace+lastWords, func() { end(ErrStopping) })
	})
	err := w.keepConnected(running)
	stop()
	w.handlers.Wait()
	return err
}

func (w *Worker) setDefaults() {
	if w.ID == "" {
		host, _ := os.Hostname() // a name for people: without one the rest must do
		w.ID = fmt.Sprintf("%.64s-%d-%.8s", host, os.Getpid(), rand.Text())
	}
	if w.Log == nil {
		w.Log = slog.Default()
	}
	if w.Grace == 0 {
		w.Grace = 30 * time.Second
	}
	w.Concurrency = min(max(w.Concurrency, 1), 10_000)
}

func (w *Worker) keepConnected(ctx context.Context) error {
	wait := firstWait
	for ctx.Err() == nil {
		began := time.Now()
		if err := w.runSession(ctx); err != nil && ctx.Err() == nil {
			if err.permanent() {
				return err
			}
			w.Log.Warn("the stream broke; connecting again", "queue", w.Queue, "error", err)
		}
		if time.Since(began) > longestWait {
			wait = firstWait
		}
		pause(ctx, wait)
		wait = min(2*wait, longestWait)
	}
	return nil
}

// runSession works over one stream until it breaks, the server drains, or ctx is done.
func (w *Worker) runSession(ctx context.Context) *Error {
	s, err := w.open()
	if err != nil {
		return FromError(err)
	}
	defer s.breakOff()
	w.attach(s)
	go s.receive()
	go s.renew()
	select {
	case <-ctx.Done():
	case <-s.draining:
	case <-s.dead:
	}
	w.detach()
	s.finish()
	return s.failure
}

func (w *Worker) attach(s *session) {
	w.mu.Lock()
	w.session, w.promised = s, 0
	w.mu.Unlock()
	w.grant()
}

func (w *Worker) detach() {
	w.mu.Lock()
	w.session = nil
	w.mu.Unlock()
}

// grant gives the session as much credit as there are free hands.
func (w *Worker) grant() {
	w.mu.Lock()
	s, credit := w.session, w.Concurrency-w.busy-w.promised
	if s != nil && credit > 0 {
		w.promised += credit
	}
	w.mu.Unlock()
	if s != nil && credit > 0 {
		_ = s.send(&workqueuev1.StreamTasksRequest{Credit: int32(credit)}) // a broken stream shows in receive
	}
}

// take accounts for leases that came; false if the session gets no more work done and they must go back.
func (w *Worker) take(s *session, count int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.session != s {
		return false
	}
	w.promised -= count
	w.busy += count
	w.handlers.Add(count)
	s.unsettled.Add(count)
	return true
}

func (w *Worker) work(s *session, h *held) {
	result, err := w.Handle(h.handler, h.lease)
	w.settle(s, h, w.outcome(h, result, err))
	s.drop(h)
	w.mu.Lock()
	w.busy--
	w.mu.Unlock()
	w.grant()
	s.unsettled.Done()
	w.handlers.Done()
}

func (w *Worker) outcome(h *held, result Result, err error) outcome {
	cause := context.Cause(h.handler)
	token := h.lease.LeaseToken
	switch {
	case err == nil:
		return completion(token, result)
	case errors.Is(err, ErrRelease), cause == ErrCancelled, cause == ErrStopping:
		return release(token)
	default:
		return failure(token, err)
	}
}

// settle says an outcome until it is durable or refused. A completion that is refused while the lease is still held, say
// for a result that is too large, becomes a failure.
func (w *Worker) settle(s *session, h *held, o outcome) {
	wait := firstWait
	for tries := 1; h.alive.Err() == nil; tries++ {
		refusal := s.settle(h.alive, o)
		switch {
		case refusal == nil:
			return
		case refusal.passing(tries):
			pause(h.alive, wait)
			wait = min(2*wait, longestWait)
		case o.isCompletion() && !refusal.leaseOver():
			o = failure(h.lease.LeaseToken, refused(refusal))
		default:
			w.Log.Warn("the outcome was refused", "task", h.lease.TaskId, "error", refusal)
			return
		}
	}
	w.Log.Warn("the outcome was not settled in time", "task", h.lease.TaskId, "cause", context.Cause(h.alive))
}

func refused(refusal *Error) *Failure {
	final := refusal.Code == codes.InvalidArgument || refusal.Reason == "PAYLOAD_TOO_LARGE"
	return &Failure{Reason: refusal.Reason, Message: refusal.Message, Final: final}
}

func pause(ctx context.Context, wait time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(wait):
	}
}
