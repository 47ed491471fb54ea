package client

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	scattergatherv1 "retinue/scattergather/v1"
)

// Leaf answers what roots ask, by calls and over streams.
type Leaf struct {
	scattergatherv1.UnimplementedLeafServiceServer

	// Answer answers one query; it is called by many goroutines at once. Required.
	//
	// It should return soon after its context is done: nobody waits for the answer any more. A coverage in the response says
	// that it stands for a part. An error made by status.Error keeps its code: INVALID_ARGUMENT, UNAUTHENTICATED and
	// PERMISSION_DENIED end the whole request, RESOURCE_EXHAUSTED spares this replica; after UNAVAILABLE another one may be
	// asked. Errors without a code are INTERNAL, and another one may be asked, too.
	Answer func(ctx context.Context, query *scattergatherv1.QueryRequest) (*scattergatherv1.QueryResponse, error)
	// Register adds what else Serve serves, such as a MergeService.
	Register func(grpc.ServiceRegistrar)
	// Grace is how long queries may go on after Serve was told to stop, by default 5 s.
	Grace time.Duration

	stopping <-chan struct{} // closed when no more queries are taken; nil where others serve the leaf
}

// Serve serves roots, health checks and reflection on a listener until ctx is done. Then it takes no more queries, gives
// those under way the grace, and returns nil. Options are for what the listener's network needs, such as grpc.Creds. A Leaf is
// served once; one that shares a server with others is registered there (RegisterLeafServiceServer), and not served.
func (l *Leaf) Serve(ctx context.Context, listener net.Listener, options ...grpc.ServerOption) error {
	l.stopping = ctx.Done()
	server, checks := grpc.NewServer(options...), health.NewServer()
	scattergatherv1.RegisterLeafServiceServer(server, l)
	grpc_health_v1.RegisterHealthServer(server, checks)
	if l.Register != nil {
		l.Register(server)
	}
	reflection.Register(server)
	context.AfterFunc(ctx, func() {
		checks.Shutdown()
		late := time.AfterFunc(l.grace(), server.Stop)
		defer late.Stop()
		server.GracefulStop()
	})
	return server.Serve(listener)
}

func (l *Leaf) grace() time.Duration {
	if l.Grace == 0 {
		return 5 * time.Second
	}
	return l.Grace
}

// Query is for roots.
func (l *Leaf) Query(ctx context.Context, query *scattergatherv1.QueryRequest) (*scattergatherv1.QueryResponse, error) {
	response, err := l.Answer(ctx, query)
	return response, failed(err).Err()
}

// failed is what is said of an error of Answer.
func failed(err error) *status.Status {
	if known, ok := status.FromError(err); ok {
		return known
	}
	if ended := status.FromContextError(err); ended.Code() != codes.Unknown {
		return ended
	}
	return status.New(codes.Internal, err.Error())
}

type queryStream = grpc.BidiStreamingServer[scattergatherv1.QueryStreamRequest, scattergatherv1.QueryStreamResponse]

// QueryStream is for roots.
func (l *Leaf) QueryStream(stream queryStream) error {
	q := &queries{answer: l.Answer, stream: stream, open: map[uint64]context.CancelFunc{}}
	ended := make(chan error, 1)
	go func() { ended <- q.receive() }()
	select {
	case err := <-ended:
		q.finish()
		return err
	case <-l.stopping:
		q.finish()
		return status.Error(codes.Unavailable, stops)
	}
}

const stops = "cannot answer: the leaf is stopping"

// queries are those of one stream.
type queries struct {
	answer func(context.Context, *scattergatherv1.QueryRequest) (*scattergatherv1.QueryResponse, error)
	stream queryStream

	sending sync.Mutex // a stream takes one message at a time

	mu       sync.Mutex
	open     map[uint64]context.CancelFunc // those whose answer somebody waits for
	finished bool                          // no more are taken
	running  sync.WaitGroup
}

// receive takes queries until the root closes the stream, or it breaks.
func (q *queries) receive() error {
	for {
		request, err := q.stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case request.Cancel:
			q.close(request.QueryId)
		case request.Query != nil:
			q.begin(request)
		}
	}
}

func (q *queries) begin(request *scattergatherv1.QueryStreamRequest) {
	ctx, cancel := q.context(request.TimeoutMicros)
	if !q.take(request.QueryId, cancel) {
		cancel()
		q.send(request.QueryId, nil, status.Error(codes.Unavailable, stops))
		return
	}
	go func() {
		defer q.running.Done()
		response, err := q.answer(ctx, request.Query)
		if q.close(request.QueryId) {
			q.send(request.QueryId, response, err)
		}
	}()
}

// context ends when the time of a query is over; 0 = when its root says so.
func (q *queries) context(micros int64) (context.Context, context.CancelFunc) {
	if micros == 0 {
		return context.WithCancel(q.stream.Context())
	}
	return context.WithTimeout(q.stream.Context(), time.Duration(micros)*time.Microsecond)
}

// take notes that a query is open; false if no more are taken.
func (q *queries) take(id uint64, cancel context.CancelFunc) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.finished {
		return false
	}
	q.open[id] = cancel
	q.running.Add(1)
	return true
}

// close ends the context of a query; false if nobody waits for its answer.
func (q *queries) close(id uint64) bool {
	q.mu.Lock()
	cancel, open := q.open[id]
	delete(q.open, id)
	q.mu.Unlock()
	if open {
		cancel()
	}
	return open
}

// finish takes no more queries, and returns when those under way have ended.
func (q *queries) finish() {
	q.mu.Lock()
	q.finished = true
	q.mu.Unlock()
	q.running.Wait()
}

func (q *queries) send(id uint64, response *scattergatherv1.QueryResponse, err error) {
	message := &scattergatherv1.QueryStreamResponse{QueryId: id}
	if said := failed(err); said.Code() == codes.OK {
		message.Response = response
	} else {
		message.Code, message.Message = int32(said.Code()), said.Message()
	}
	q.sending.Lock()
	defer q.sending.Unlock()
	_ = q.stream.Send(message) // a broken stream shows in receive
}
