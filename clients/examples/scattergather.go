// Scatter/gather from end to end; prints clients/transcripts/scattergather.txt. It asks a pool and serves the pool's leaves
// itself, at the addresses that the root expects them at.
// In clients/go, with a root that has the pools of clients/examples/scattergather.yaml: go run ../examples/scattergather.go
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"retinue/client"
	pb "retinue/scattergather/v1"
)

const timeout = 10 * time.Second

var (
	ctx     = context.Background()
	shelves = map[string][]book{
		"a": {{"Moby Dick", "sea whale ship sea"}, {"Emma", "ball letter walk"}},
		"b": {{"Treasure Island", "sea map ship"}, {"Dracula", "letter castle ship"}},
		"c": {{"Odyssey", "sea ship sea home sea"}, {"Walden", "pond walk"}},
	}
	sea = query{Word: "sea"}
)

type book struct{ title, text string }

// query is what leaves are asked: the books that have a word. The shelf Hangs hangs.
type query struct {
	Word  string `json:"word"`
	Hangs string `json:"hangs,omitempty"`
}

type hit struct {
	ID    string `json:"id"`
	Score int    `json:"score"`
	Shelf string `json:"shelf"`
}

// shelf is a leaf: it finds the books of its shelf, those that have the word most often first.
type shelf struct {
	name string
	told chan bool // gets true when nobody waits for its answer any more
	stop func()

	mu        sync.Mutex
	remaining time.Duration // of the latest query
}

func (s *shelf) answer(ctx context.Context, request *pb.QueryRequest) (*pb.QueryResponse, error) {
	var asked query
	if err := json.Unmarshal(request.Payload, &asked); err != nil || asked.Word == "" {
		return nil, status.Error(codes.InvalidArgument, "a word is needed")
	}
	if deadline, ok := ctx.Deadline(); ok {
		s.mu.Lock()
		s.remaining = time.Until(deadline)
		s.mu.Unlock()
	}
	if asked.Hangs == s.name {
		<-ctx.Done()
		s.told <- true
		return nil, ctx.Err()
	}
	text, err := json.Marshal(s.find(asked.Word))
	return &pb.QueryResponse{Payload: text}, err
}

func (s *shelf) find(word string) []hit {
	hits := []hit{}
	for _, book := range shelves[s.name] {
		if count := strings.Count(book.text, word); count > 0 {
			hits = append(hits, hit{ID: book.title, Score: count, Shelf: s.name})
		}
	}
	slices.SortStableFunc(hits, func(a, b hit) int { return cmp.Compare(b.Score, a.Score) })
	return hits
}

// serve serves it where the root expects it; the shelf a has the merge beside it.
func (s *shelf) serve(address string) {
	network, path := "tcp", address
	if socket, ok := strings.CutPrefix(address, "unix:"); ok {
		network, path = "unix", socket
	}
	listener := must(net.Listen(network, path))
	leaf := &client.Leaf{Answer: s.answer}
	if s.name == "a" {
		leaf.Register = func(server grpc.ServiceRegistrar) { pb.RegisterMergeServiceServer(server, fuse{}) }
	}
	serving, stop := context.WithCancel(ctx)
	over := make(chan error, 1)
	go func() { over <- leaf.Serve(serving, listener) }()
	s.stop = func() { stop(); check(<-over) }
}

// fuse is a merge: the titles that were found, in their order.
type fuse struct {
	pb.UnimplementedMergeServiceServer
}

func (fuse) Merge(_ context.Context, request *pb.MergeRequest) (*pb.MergeResponse, error) {
	var titles []string
	for _, reply := range request.Replies {
		var hits []hit
		if err := json.Unmarshal(reply.Payload, &hits); err != nil {
			return nil, err
		}
		for _, hit := range hits {
			titles = append(titles, hit.ID)
		}
	}
	slices.Sort(titles)
	said := fmt.Sprintf("%s shelves have %s", covered(request.Coverage), strings.Join(titles, ", "))
	return &pb.MergeResponse{Payload: []byte(said)}, nil
}

// root is a pool, and what its stubs give beside it.
type root struct {
	*client.Pool
	topology pb.TopologyServiceClient
}

func main() {
	name := "transcript"
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	channel := must(client.Dial("scattergather"))
	defer channel.Close()
	stub, topology := pb.NewScatterGatherServiceClient(channel), pb.NewTopologyServiceClient(channel)
	pool := &root{&client.Pool{Client: stub, ID: name}, topology}
	merged := &root{&client.Pool{Client: stub, ID: name + "-merged"}, topology}
	addresses, leaves := expected(pool), map[string]*shelf{}
	nobody(pool)
	for name, address := range addresses {
		leaves[name] = &shelf{name: name, told: make(chan bool, 1)}
		leaves[name].serve(address)
	}
	connected(merged, "a, b, c")
	fmt.Println("all are served; connected:", connected(pool, "a, b, c"))
	ask(pool, leaves)
	askOtherWays(pool, merged)
	refuse(pool)
	hang(pool, leaves["c"])
	lose(pool, leaves["c"], addresses["c"])
	for _, shelf := range leaves {
		shelf.stop()
	}
}

// expected tells whom the root expects where: for each shard an address.
func expected(pool *root) map[string]string {
	known := must(pool.topology.GetTopology(ctx, &pb.GetTopologyRequest{PoolId: pool.ID})).Pool
	addresses := map[string]string{}
	for _, shard := range known.Shards {
		addresses[shard.ShardId] = shard.Endpoints[0].Address
	}
	merge := strings.TrimPrefix(known.Merge.String(), "MERGE_")
	fmt.Printf("the pool expects %s, merges by %s the best %d\n", names(known.Shards), merge, known.TopK)
	return addresses
}

// connected waits until the root is connected to these shards and no others.
func connected(pool *root, wanted string) string {
	watching, stop := context.WithCancel(ctx)
	defer stop()
	seen := must(pool.topology.WatchTopology(watching, &pb.WatchTopologyRequest{PoolId: pool.ID}))
	for {
		shards := must(seen.Recv()).Pool.Shards
		shards = slices.DeleteFunc(shards, func(shard *pb.Shard) bool { return !shard.Endpoints[0].Connected })
		if shown := cmp.Or(names(shards), "none"); shown == wanted {
			return shown
		}
	}
}

func names(shards []*pb.Shard) string {
	var found []string
	for _, shard := range shards {
		found = append(found, shard.ShardId)
	}
	return strings.Join(found, ", ")
}

func nobody(pool *root) {
	fmt.Println("nobody serves it; connected:", connected(pool, "none"))
	fmt.Println("asked for sea:", told(refused(pool, client.Question{JSON: sea})))
}

func ask(pool *root, leaves map[string]*shelf) {
	show("asked for sea", pool, client.Question{JSON: sea})
	less := true
	for _, shelf := range leaves {
		shelf.mu.Lock()
		less = less && 0 < shelf.remaining && shelf.remaining < timeout
		shelf.mu.Unlock()
	}
	fmt.Printf("each leaf had less time than we gave: %t\n", less)
	show("asked shelf b alone for ship", pool, client.Question{JSON: query{Word: "ship"}, Shards: []string{"b"}})
	inputs := map[string][]byte{"a": must(json.Marshal(query{Word: "whale"})), "c": must(json.Marshal(query{Word: "pond"}))}
	show("asked a for whale and c for pond", pool, client.Question{Inputs: inputs})
}

func askOtherWays(pool, merged *root) {
	request := &pb.ScatterRequest{PoolId: pool.ID, RouteKeys: []string{"cyd"}}
	plan := must(pool.Client.ExplainScatter(ctx, &pb.ExplainScatterRequest{Request: request}))
	answer := scatter(pool, client.Question{JSON: query{Word: "ship"}, Keys: []string{"cyd"}})
	fmt.Printf("routed by the key cyd: %s would be asked, %s answered\n", names(plan.Shards), hits(answer)[0].Shelf)
	stream(pool)
	fmt.Printf("merged by a service of ours: %s\n", scatter(merged, client.Question{JSON: sea}).GetPayload())
}

func stream(pool *root) {
	var replied []string
	var last *pb.ScatterStreamResponse
	for event, err := range pool.Stream(ctx, client.Question{JSON: sea}) {
		check(err)
		if reply := event.GetReply(); reply != nil {
			replied = append(replied, reply.Outcome.ShardId)
		}
		last = event
	}
	slices.Sort(replied)
	answer := &client.Answer{ScatterResponse: last.GetAnswer()}
	fmt.Printf("streamed: %s replied, then came the answer: %s\n", strings.Join(replied, ", "), state(answer))
}

func refuse(pool *root) {
	wrong := enough(2)
	wrong.FirstK = -1
	nonsense := &root{&client.Pool{Client: pool.Client, ID: "no spaces, please"}, pool.topology}
	refusal := refused(nonsense, client.Question{JSON: sea, Policy: wrong})
	fmt.Println("asked with nonsense:", told(refusal))
	slices.SortFunc(refusal.Fields, func(a, b client.Field) int { return strings.Compare(a.Path, b.Path) })
	for _, field := range refusal.Fields {
		fmt.Println(" ", field.Path)
	}
	unknown := &root{&client.Pool{Client: pool.Client, ID: "nobody-knows"}, pool.topology}
	fmt.Println("asked a pool that nobody knows:", told(refused(unknown, client.Question{JSON: sea})))
	refusal = refused(pool, client.Question{JSON: query{}})
	fmt.Printf("asked for no word: %s: %s\n", told(refusal), refusal.Message)
}

func hang(pool *root, shelf *shelf) {
	first := enough(0.5)
	first.FirstK = 2
	question := client.Question{JSON: query{Word: "sea", Hangs: "c"}, Policy: first}
	answer := show("asked for the first two, c hangs", pool, question)
	fmt.Printf("c was told that nobody waits for it: %t\n", <-shelf.told)
	request := &pb.ListRecentScattersRequest{ScatterId: answer.ScatterId}
	var outcomes []string
	for _, attempt := range must(pool.Client.ListRecentScatters(ctx, request)).Scatters[0].Attempts {
		outcome := strings.TrimPrefix(attempt.Outcome.String(), "ATTEMPT_OUTCOME_")
		outcomes = append(outcomes, attempt.ShardId+" "+outcome)
	}
	slices.Sort(outcomes)
	fmt.Println("remembered of it:", strings.Join(outcomes, ", "))
}

func lose(pool *root, shelf *shelf, address string) {
	shelf.stop()
	fmt.Println("c stops; connected:", connected(pool, "a, b"))
	fmt.Println("asked for sea:", missed(refused(pool, client.Question{JSON: sea})))
	show("asked for sea, two thirds are enough", pool, client.Question{JSON: sea, Policy: enough(0.66)})
	refusal := refused(pool, client.Question{JSON: sea, Policy: enough(0.9)})
	fmt.Println("asked for sea, nine tenths are enough:", missed(refusal))
	shelf.serve(address)
	fmt.Println("c is back; connected:", connected(pool, "a, b, c"))
	show("asked for sea", pool, client.Question{JSON: sea})
}

// enough is a policy: so much of the pool must have answered.
func enough(coverage float64) *pb.ScatterPolicy { return &pb.ScatterPolicy{MinCoverage: &coverage} }

func scatter(pool *root, question client.Question) *client.Answer {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return must(pool.Scatter(ctx, question))
}

func refused(pool *root, question client.Question) *client.Error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err := pool.Scatter(ctx, question)
	return client.FromError(err)
}

func show(what string, pool *root, question client.Question) *client.Answer {
	answer := scatter(pool, question)
	fmt.Printf("%s: %s\n", what, state(answer))
	for _, hit := range hits(answer) {
		fmt.Printf("  %d %s, shelf %s\n", hit.Score, hit.ID, hit.Shelf)
	}
	return answer
}

func hits(answer *client.Answer) (hits []hit) {
	check(answer.Decode(&hits))
	return hits
}

func state(answer *client.Answer) string {
	word := map[bool]string{true: "complete", false: "partial"}[answer.Complete()]
	return fmt.Sprintf("%s, %s%s", word, covered(answer.Coverage), without(answer.Failures))
}

func covered(coverage *pb.Coverage) string {
	return fmt.Sprintf("%d of %d", coverage.Answered, coverage.Expected)
}

func without(failures []*pb.ShardOutcome) (said string) {
	for _, one := range failures {
		said += fmt.Sprintf(", without %s (%s)", one.ShardId, code.Code(one.Code))
	}
	return said
}

func told(refusal *client.Error) string { return refusal.CodeName() + " " + refusal.Reason }

// missed tells of the shards that failed, too; others were not waited for any more.
func missed(refusal *client.Error) string {
	failed := slices.DeleteFunc(refusal.Missing.Failures, func(one *pb.ShardOutcome) bool {
		return codes.Code(one.Code) == codes.Canceled
	})
	return told(refusal) + without(failed)
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func must[T any](value T, err error) T {
	check(err)
	return value
}
