package client_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"retinue/client"
	pb "retinue/scattergather/v1"
)

// grown is a leaf that is served, and a root's way to it. What it does to a query, the query's payload says.
type grown struct {
	*testing.T
	channel *grpc.ClientConn
	root    pb.LeafServiceClient
	begun   chan string // the shards of queries that wait
	causes  chan error  // why they did not wait longer
	release chan bool
	stop    func() error // tells Serve to stop, and gives what it returns
}

func grow(t *testing.T) *grown {
	g := &grown{T: t, begun: make(chan string, 10), causes: make(chan error, 10), release: make(chan bool)}
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	address := g.serve(ctx, over)
	g.stop = func() error { cancel(); return within(t, over) }
	t.Cleanup(cancel)
	channel, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { channel.Close() })
	g.channel, g.root = channel, pb.NewLeafServiceClient(channel)
	return g
}

func (g *grown) serve(ctx context.Context, over chan<- error) (address string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		g.Fatal(err)
	}
	leaf := &client.Leaf{Answer: g.answer, Grace: patience}
	go func() { over <- leaf.Serve(ctx, listener) }()
	return listener.Addr().String()
}

func (g *grown) answer(ctx context.Context, query *pb.QueryRequest) (*pb.QueryResponse, error) {
	switch string(query.Payload) {
	case "wait":
		g.begun <- query.ShardId
		select {
		case <-ctx.Done():
			g.causes <- ctx.Err()
			return nil, ctx.Err()
		case <-g.release:
		}
	case "refuse":
		return nil, status.Error(codes.PermissionDenied, "not for you")
	case "break":
		return nil, errors.New("broken")
	}
	half := &pb.Coverage{Expected: 2, Answered: 1}
	return &pb.QueryResponse{Payload: []byte(query.ShardId + " says " + string(query.Payload)), Coverage: half}, nil
}

// talk opens a stream of queries.
func (g *grown) talk() *talk {
	ctx, cancel := context.WithCancel(g.Context())
	stream, err := g.root.QueryStream(ctx)
	if err != nil {
		g.Fatal(err)
	}
	said := &talk{grown: g, stream: stream, cut: cancel, answers: make(chan *pb.QueryStreamResponse, 10), over: make(chan error, 1)}
	go said.hear()
	return said
}

type talk struct {
	*grown
	stream  grpc.BidiStreamingClient[pb.QueryStreamRequest, pb.QueryStreamResponse]
	cut     func()
	answers chan *pb.QueryStreamResponse
	over    chan error
}

func (t *talk) hear() {
	for {
		answer, err := t.stream.Recv()
		if err != nil {
			t.over <- err
			return
		}
		t.answers <- answer
	}
}

func (t *talk) say(request *pb.QueryStreamRequest) {
	t.Helper()
	if err := t.stream.Send(request); err != nil {
		t.Fatal(err)
	}
}

func (t *talk) ask(id uint64, payload string, timeout time.Duration) {
	t.Helper()
	query := &pb.QueryRequest{ShardId: "s1", Payload: []byte(payload)}
	t.say(&pb.QueryStreamRequest{QueryId: id, Query: query, TimeoutMicros: timeout.Microseconds()})
}

func (t *talk) next() *pb.QueryStreamResponse {
	t.Helper()
	return within(t, t.answers)
}

func TestALeafAnswersACallWithWhatItsFunctionGives(t *testing.T) {
	g := grow(t)
	response, err := g.root.Query(t.Context(), &pb.QueryRequest{ShardId: "s1", Payload: []byte("hello")})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "the payload", string(response.Payload), "s1 says hello")
	expect(t, "the coverage", response.Coverage.Answered, int64(1))
}

func TestALeafAnswersQueriesOfAStreamAsTheyAreReady(t *testing.T) {
	said := grow(t).talk()
	said.ask(1, "wait", 0)
	within(t, said.begun)
	said.ask(2, "hello", patience)
	second := said.next()
	expect(t, "the first answer's query", second.QueryId, uint64(2))
	expect(t, "its payload", string(second.Response.GetPayload()), "s1 says hello")
	expect(t, "its coverage", second.Response.Coverage.GetAnswered(), int64(1))
	said.release <- true
	expect(t, "the second answer's query", said.next().QueryId, uint64(1))
}

func TestAnErrorKeepsItsCodeByACallAndOnAStream(t *testing.T) {
	g := grow(t)
	said := g.talk()
	for payload, code := range map[string]codes.Code{"refuse": codes.PermissionDenied, "break": codes.Internal} {
		_, err := g.root.Query(t.Context(), &pb.QueryRequest{Payload: []byte(payload)})
		said.ask(uint64(code), payload, 0)
		answer := said.next()
		expect(t, "the code of a call", status.Code(err), code)
		expect(t, "the code on a stream", codes.Code(answer.Code), code)
		expect(t, "the message", answer.Message, status.Convert(err).Message())
		expect(t, "that there is no response", answer.Response == nil, true)
	}
}

func TestACancelledQueryIsStoppedAndNothingIsSaidOfIt(t *testing.T) {
	said := grow(t).talk()
	said.ask(1, "wait", 0)
	within(t, said.begun)
	said.say(&pb.QueryStreamRequest{QueryId: 1, Cancel: true})
	expect(t, "why it stopped", within(t, said.causes), context.Canceled)
	said.say(&pb.QueryStreamRequest{QueryId: 7, Cancel: true}) // nobody's: a late one
	said.ask(2, "hello", 0)
	expect(t, "the only answer's query", said.next().QueryId, uint64(2))
	if err := said.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	within(t, said.over)
	expect(t, "the answers that are left", len(said.answers), 0)
}

func TestAQueryWhoseTimeIsOverIsStopped(t *testing.T) {
	g := grow(t)
	said := g.talk()
	said.ask(1, "wait", 10*time.Millisecond)
	expect(t, "why it stopped", within(t, said.causes), context.DeadlineExceeded)
	expect(t, "its code", codes.Code(said.next().Code), codes.DeadlineExceeded)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := g.root.Query(ctx, &pb.QueryRequest{Payload: []byte("wait")})
	expect(t, "the code of a call", status.Code(err), codes.DeadlineExceeded)
}

func TestABrokenStreamStopsItsQueries(t *testing.T) {
	said := grow(t).talk()
	said.ask(1, "wait", 0)
	said.ask(2, "wait", 0)
	within(t, said.begun)
	within(t, said.begun)
	said.cut()
	expect(t, "why the first stopped", within(t, said.causes), context.Canceled)
	expect(t, "why the second stopped", within(t, said.causes), context.Canceled)
}

func TestALeafThatStopsAnswersWhatItHasBegun(t *testing.T) {
	g := grow(t)
	checks := grpc_health_v1.NewHealthClient(g.channel)
	health, err := checks.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil || health.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Fatal(health, err)
	}
	said := g.talk()
	said.ask(1, "wait", 0)
	within(t, g.begun)
	over := make(chan error, 1)
	go func() { over <- g.stop() }()
	for id := uint64(2); ; id++ { // until it has heard that it is to stop
		said.ask(id, "hello", 0)
		if codes.Code(said.next().Code) == codes.Unavailable {
			break
		}
	}
	g.release <- true
	expect(t, "the query of the last answer", said.next().QueryId, uint64(1))
	expect(t, "the code of the stream", status.Code(within(t, said.over)), codes.Unavailable)
	expect(t, "what Serve returns", within(t, over), nil)
}
