package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"retinue/client"
	pb "retinue/scattergather/v1"
)

// grove has the leaves of the server's pool "go": shards a, b and c on sockets, whose best three hits are merged. Leaves answer
// with their shard's name; "fail c" and "wait c" say what c does instead.
type grove struct {
	*testing.T
	pool   *client.Pool
	waits  chan bool
	causes chan error
}

type hit struct {
	ID    string `json:"id"`
	Score int    `json:"score"`
}

func plant(t *testing.T) *grove {
	if os.Getenv("RETINUE_ADDRESS") == "" {
		t.Fatal("cannot test: set RETINUE_ADDRESS to that of a server with a pool named go")
	}
	channel, err := client.Dial("scattergather")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { channel.Close() })
	pool := &client.Pool{Client: pb.NewScatterGatherServiceClient(channel), ID: "go"}
	g := &grove{T: t, pool: pool, waits: make(chan bool, 10), causes: make(chan error, 10)}
	seen, err := pb.NewTopologyServiceClient(channel).WatchTopology(t.Context(), &pb.WatchTopologyRequest{PoolId: "go"})
	if err != nil {
		t.Fatal(err)
	}
	g.serveWhatIs(seen)
	return g
}

type topologies interface {
	Recv() (*pb.WatchTopologyResponse, error)
}

// serveWhatIs serves every shard where the pool expects it, until the root is connected to all.
func (g *grove) serveWhatIs(seen topologies) {
	for served := false; ; served = true {
		topology, err := seen.Recv()
		if err != nil {
			g.Fatal(err)
		}
		connected := true
		for _, shard := range topology.Pool.Shards {
			connected = connected && shard.Endpoints[0].Connected
			if !served {
				g.serve(strings.TrimPrefix(shard.Endpoints[0].Address, "unix:"))
			}
		}
		if served && connected {
			return
		}
	}
}

func (g *grove) serve(path string) {
	ctx, stop := context.WithCancel(context.Background())
	listener, err := net.Listen("unix", path)
	if err != nil {
		g.Fatal(err)
	}
	over := make(chan error, 1)
	go func() { over <- (&client.Leaf{Answer: g.answer}).Serve(ctx, listener) }()
	g.Cleanup(func() { stop(); expect(g, "what Serve returns", within(g, over), nil) })
}

func (g *grove) answer(ctx context.Context, query *pb.QueryRequest) (*pb.QueryResponse, error) {
	switch string(query.Payload) {
	case "fail " + query.ShardId:
		return nil, status.Error(codes.DataLoss, "the page is torn")
	case "wait " + query.ShardId:
		g.waits <- true
		<-ctx.Done()
		g.causes <- ctx.Err()
		return nil, ctx.Err()
	}
	text, err := json.Marshal([]hit{{ID: query.ShardId + " " + string(query.Payload), Score: 1}})
	return &pb.QueryResponse{Payload: text}, err
}

func (g *grove) ids(question client.Question) (ids []string) {
	g.Helper()
	answer, err := g.pool.Scatter(g.Context(), question)
	if err != nil {
		g.Fatal(err)
	}
	return g.decoded(answer)
}

func (g *grove) decoded(answer *client.Answer) (ids []string) {
	g.Helper()
	var hits []hit
	if err := answer.Decode(&hits); err != nil {
		g.Fatal(err)
	}
	for _, hit := range hits {
		ids = append(ids, hit.ID)
	}
	return ids
}

func (g *grove) expectIDs(what string, got []string, want ...string) {
	g.Helper()
	if !slices.Equal(got, want) {
		g.Errorf("%s is %q, not %q", what, got, want)
	}
}

func TestAnAnswerOfAllShardsIsComplete(t *testing.T) {
	g := plant(t)
	answer, err := g.pool.Scatter(t.Context(), client.Question{Payload: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "whether it is complete", answer.Complete(), true)
	expect(t, "the coverage", answer.Coverage.Answered, int64(3))
	g.expectIDs("the answer", g.decoded(answer), "a x", "b x", "c x")
}

func TestAQuestionSelectsShards(t *testing.T) {
	g := plant(t)
	inputs := map[string][]byte{"a": []byte("x"), "c": []byte("y")}
	g.expectIDs("what each was asked", g.ids(client.Question{Inputs: inputs}), "a x", "c y")
	g.expectIDs("what one was asked", g.ids(client.Question{Payload: []byte("x"), Shards: []string{"b"}}), "b x")
	routed := g.ids(client.Question{Payload: []byte("x"), Keys: []string{"a key"}})
	expect(t, "how many have a key", len(routed), 1)
}

func TestAQuestionMayBeAValue(t *testing.T) {
	g := plant(t)
	question := client.Question{JSON: map[string]any{"word": "x"}, Shards: []string{"b"}}
	g.expectIDs("what it was asked", g.ids(question), `b {"word":"x"}`)
	_, err := g.pool.Scatter(t.Context(), client.Question{JSON: func() {}})
	var wrong *json.UnsupportedTypeError
	expect(t, "that no JSON is an error", errors.As(err, &wrong), true)
}

func TestAScatterThatFailsTellsWhatIsMissing(t *testing.T) {
	g := plant(t)
	_, err := g.pool.Scatter(t.Context(), client.Question{Payload: []byte("fail c")})
	refusal := client.FromError(err)
	expect(t, "the reason", refusal.Reason, "COVERAGE_NOT_MET")
	expect(t, "what was expected", refusal.Missing.GetCoverage().GetExpected(), int64(3))
	lost := refusal.Missing.GetFailures()[0]
	expect(t, "the shard", lost.ShardId, "c")
	expect(t, "its code", codes.Code(lost.Code), codes.DataLoss)
	expect(t, "its message", lost.Message, "the page is torn")
	_, err = (&client.Pool{Client: g.pool.Client, ID: "unknown"}).Scatter(t.Context(), client.Question{})
	expect(t, "that a refusal has none", client.FromError(err).Missing == nil, true)
}

func TestAnAnswerIsPartialWhereThePolicySaysSo(t *testing.T) {
	g := plant(t)
	half := 0.5
	policy := &pb.ScatterPolicy{MinCoverage: &half}
	answer, err := g.pool.Scatter(t.Context(), client.Question{Payload: []byte("fail c"), Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "whether it is complete", answer.Complete(), false)
	expect(t, "the coverage", answer.Coverage.Answered, int64(2))
	expect(t, "what is missing", answer.Failures[0].ShardId, "c")
	g.expectIDs("the answer", g.decoded(answer), "a fail c", "b fail c")
}

func TestAStreamTellsOfEachShardAndThenOfTheAnswer(t *testing.T) {
	g := plant(t)
	var told []string
	for event, err := range g.pool.Stream(t.Context(), client.Question{Payload: []byte("x")}) {
		if err != nil {
			t.Fatal(err)
		}
		switch event := event.Event.(type) {
		case *pb.ScatterStreamResponse_Reply:
			told = append(told, event.Reply.Outcome.ShardId)
		case *pb.ScatterStreamResponse_Answer:
			g.expectIDs("the answer", g.decoded(&client.Answer{ScatterResponse: event.Answer}), "a x", "b x", "c x")
			told = append(told, "answer")
		}
	}
	slices.Sort(told[:3])
	g.expectIDs("what is told", told, "a", "b", "c", "answer")
}

func TestAnErrorIsTheLastOfAStream(t *testing.T) {
	g := plant(t)
	var told []error
	for _, err := range g.pool.Stream(t.Context(), client.Question{Payload: []byte("fail c")}) {
		told = append(told, err)
	}
	expect(t, "its reason", client.FromError(told[len(told)-1]).Reason, "COVERAGE_NOT_MET")
}

func TestWhoLeavesTheLoopCancelsTheLeaves(t *testing.T) {
	g := plant(t)
	for _, err := range g.pool.Stream(t.Context(), client.Question{Payload: []byte("wait c")}) {
		if err != nil {
			t.Fatal(err)
		}
		within(t, g.waits)
		break
	}
	expect(t, "what the leaf was told", within(t, g.causes), context.Canceled)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-g.waits; cancel() }()
	_, err := g.pool.Scatter(ctx, client.Question{Payload: []byte("wait c")})
	expect(t, "what the caller gets", status.Code(err), codes.Canceled)
	expect(t, "what the leaf was told", within(t, g.causes), context.Canceled)
}
