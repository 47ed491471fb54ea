// The ambassador from end to end; prints clients/transcripts/ambassador.txt. It declares upstreams over servers of its own and
// uses them as any app would: by ports of localhost. Give another name to run it twice: counts stay.
// In clients/go, with RETINUE_CONTROL_ADDRESS set to the control socket of an ambassador that has Envoy and may dial loopback, as
// that of `make run` may: go run ../examples/ambassador.go
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	pb "retinue/ambassador/v1"
	"retinue/client"
)

const (
	wait  = 20 * time.Second // for what takes a moment
	asked = 9 + 12           // how many requests are counted
)

var (
	ctx    = context.Background()
	canary = http.Header{"X-Canary": {"1"}}
	// browser is an ordinary client; it keeps no connections, so that none is left to be drained.
	browser = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: wait}
)

// server stands behind: it answers with its name; nothing is at /nowhere, and /held waits until it is released.
type server struct {
	name, address  string
	held, released chan struct{}
	stop           func() error
}

func serve(name string) *server {
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	s := &server{name: name, address: listener.Addr().String(), held: make(chan struct{}), released: make(chan struct{})}
	serving := &http.Server{Handler: s}
	s.stop = serving.Close
	go serving.Serve(listener)
	return s
}

func (s *server) ServeHTTP(writer http.ResponseWriter, request *http.Request) {
	switch request.URL.Path {
	case "/held":
		close(s.held)
		<-s.released
	case "/nowhere":
		writer.WriteHeader(http.StatusNotFound)
	}
	fmt.Fprint(writer, s.name)
}

// shop is the upstream of the story, and who has to do with it.
type shop struct {
	id, canaryID  string
	app, operator *client.Ambassador
	servers       map[string]*server
	address, etag string
}

// wanted is it over these servers; a request that did not reach one is tried at another.
func (s *shop) wanted(weights map[string]int32, splits ...*pb.Split) *pb.Upstream {
	found := client.NewUpstream(s.id, pb.Protocol_PROTOCOL_HTTP, 0)
	for _, name := range slices.Sorted(maps.Keys(weights)) {
		endpoint := &pb.Endpoint{Address: s.servers[name].address, Weight: weights[name]}
		found.GetStatic().Endpoints = append(found.GetStatic().Endpoints, endpoint)
	}
	retry := &pb.Retry{On: []pb.RetryCondition{
		pb.RetryCondition_RETRY_CONDITION_CONNECT_FAILURE, pb.RetryCondition_RETRY_CONDITION_RESET,
	}}
	found.Policy = &pb.Policy{Retry: retry, Splits: splits}
	return found
}

func (s *shop) declare(weights map[string]int32, splits ...*pb.Split) *pb.Upstream {
	found := must(s.operator.Declare(ctx, client.Declaration{Upstream: s.wanted(weights, splits...), Wait: wait}))
	s.address, s.etag = found.Status.Address, found.Etag
	return found
}

// get asks as any app does: it knows nothing but a port of localhost.
func (s *shop) get(path string, header http.Header) (int, string, error) {
	request := must(http.NewRequest(http.MethodGet, "http://"+s.address+path, nil))
	request.Header = header.Clone()
	answer, err := browser.Do(request)
	if err != nil {
		return 0, "", err
	}
	return answer.StatusCode, text(answer), nil
}

// tally asks many times: who answered how many.
func (s *shop) tally(requests int, header http.Header) string {
	counts := map[string]int64{}
	for range requests {
		code, name, err := s.get("/", header)
		check(err)
		if code != http.StatusOK {
			name = fmt.Sprint(code)
		}
		counts[name]++
	}
	return shares(counts)
}

func main() {
	name := "transcript"
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	channel, control := must(client.Dial("ambassador")), must(client.Dial("control"))
	defer channel.Close()
	defer control.Close()
	s := &shop{
		id: name + "-shop", canaryID: name + "-canary", servers: map[string]*server{},
		app:      &client.Ambassador{Client: pb.NewAmbassadorServiceClient(channel)},
		operator: &client.Ambassador{Client: pb.NewAmbassadorServiceClient(control)},
	}
	for _, letter := range []string{"a", "b", "c", "d"} {
		s.servers[letter] = serve(letter)
		defer s.servers[letter].stop()
	}
	seen := watch(s)
	look(s)
	refuse(s)
	declare(s, seen)
	weigh(s)
	split(s)
	change(s)
	lose(s)
	drain(s, seen)
	remove(s, seen)
}

// watch tells what the app sees, state by state.
func watch(s *shop) <-chan string {
	seen, synced := make(chan string, 100), make(chan bool)
	go func() {
		defer close(seen)
		for event, err := range s.app.Watch(ctx, s.id) {
			if err != nil {
				return
			}
			switch event := event.Event.(type) {
			case *pb.WatchUpstreamsResponse_Synced:
				synced <- true
			case *pb.WatchUpstreamsResponse_Upstream:
				seen <- state(event.Upstream)
			case *pb.WatchUpstreamsResponse_RemovedUpstreamId:
				seen <- "gone"
			}
		}
	}()
	<-synced
	return seen
}

// until waits until the app has seen it so.
func until(seen <-chan string, wanted string) string {
	for state := range seen {
		if state == wanted {
			return state
		}
	}
	panic("the watch ended")
}

func look(s *shop) {
	can := map[pb.Protocol]bool{}
	for _, plane := range must(s.app.DataPlanes(ctx)) {
		for _, one := range plane.Capabilities {
			can[one.Protocol] = can[one.Protocol] || one.Name == "policy.splits"
		}
	}
	fmt.Printf("HTTP can be split: %t, TCP: %t\n", can[pb.Protocol_PROTOCOL_HTTP], can[pb.Protocol_PROTOCOL_TCP])
}

func refuse(s *shop) {
	_, err := s.app.Declare(ctx, client.Declaration{Upstream: s.wanted(map[string]int32{"a": 1})})
	fmt.Println("an app declares:", told(err))
	nonsense := client.NewUpstream(s.id, pb.Protocol_PROTOCOL_TCP, 70_000, "example.com:80")
	nonsense.Policy = &pb.Policy{Mirror: &pb.Mirror{UpstreamId: s.canaryID}}
	refusal := refused(s, nonsense)
	fmt.Println("declared nonsense:", told(refusal))
	fields := refusal.Fields
	slices.SortFunc(fields, func(a, b client.Field) int { return strings.Compare(a.Path, b.Path) })
	for _, field := range fields {
		fmt.Println(" ", field.Path)
	}
	cache := client.NewUpstream(s.id, pb.Protocol_PROTOCOL_MEMCACHED, 0, "10.0.0.1:11211")
	cache.Policy = &pb.Policy{RateLimit: &pb.RateLimit{Requests: 100}}
	refusal = refused(s, cache)
	fmt.Printf("declared what nobody can do: %s: %s of MEMCACHED\n", told(refusal), refusal.Metadata["capability"])
	for _, address := range []string{"169.254.169.254:80", "[::ffff:169.254.169.254]:80"} {
		refusal = refused(s, client.NewUpstream(s.id, pb.Protocol_PROTOCOL_HTTP, 0, address))
		fmt.Printf("declared over %s: %s\n", address, told(refusal))
	}
	fmt.Println(" ", refusal.Message)
	_, err = s.app.Get(ctx, s.id)
	fmt.Println("nothing came of it:", told(err))
}

func declare(s *shop, seen <-chan string) {
	waited := make(chan error, 1)
	go func() { waited <- served(s, s.id) }()
	first := s.declare(map[string]int32{"a": 1, "b": 1, "c": 1})
	check(<-waited)
	local := strings.HasPrefix(s.address, "127.0.0.1:")
	fmt.Printf("declared over a, b, c: %s, on localhost: %t; an app that waited goes on\n", state(first), local)
	fmt.Println("the app sees it:", until(seen, "ACTIVE"))
	fmt.Println("9 requests:", s.tally(9, nil))
	again := s.declare(map[string]int32{"a": 1, "b": 1, "c": 1})
	fmt.Printf("declared again: nothing changes: %t\n", again.Etag == first.Etag)
}

// served waits as an app does that dials it afterwards.
func served(s *shop, id string) error {
	waiting, stop := context.WithTimeout(ctx, wait)
	defer stop()
	return s.app.Wait(waiting, id)
}

func weigh(s *shop) {
	before, etag := s.address, s.etag
	s.declare(map[string]int32{"a": 2, "b": 1, "c": 1})
	fmt.Printf("a weighs 2, at the same address: %t\n", s.address == before)
	fmt.Println("12 requests:", s.tally(12, nil))
	_, err := s.operator.Declare(ctx, client.Declaration{Upstream: s.wanted(map[string]int32{"a": 1}), Etag: etag})
	fmt.Println("declared by the etag from before:", told(err))
	counted := stats(s, func(counted *pb.UpstreamStats) bool {
		sum := int64(0)
		for _, one := range counted.Endpoints {
			sum += one.Requests
		}
		return min(counted.Requests, sum) >= asked
	})
	counts := map[string]int64{}
	for _, server := range s.servers {
		for _, one := range counted.Endpoints {
			if one.Address == server.address {
				counts[server.name] = one.Requests
			}
		}
	}
	fmt.Printf("counted: %d requests, %d errors; %s\n", counted.Requests, counted.Errors, shares(counts))
}

// stats waits until so much is counted.
func stats(s *shop, enough func(*pb.UpstreamStats) bool) *pb.UpstreamStats {
	for snapshot, err := range s.app.Stats(ctx, 100*time.Millisecond, s.id) {
		check(err)
		if enough(snapshot[0]) {
			return snapshot[0]
		}
	}
	panic("the stats ended")
}

func split(s *shop) {
	some := &pb.Split{UpstreamId: s.canaryID, Header: &pb.HeaderMatch{Name: "x-canary"}}
	fmt.Println("split to one that is not there:", told(refused(s, s.wanted(map[string]int32{"a": 1}, some))))
	other := client.NewUpstream(s.canaryID, pb.Protocol_PROTOCOL_HTTP, 0, s.servers["d"].address)
	must(s.operator.Declare(ctx, client.Declaration{Upstream: other}))
	check(served(s, s.canaryID))
	s.declare(map[string]int32{"a": 1, "b": 1, "c": 1}, some)
	fmt.Println("split by a header: 9 requests with it:", s.tally(9, canary))
	fmt.Println("9 without it:", s.tally(9, nil))
	found, missing := invoke(s, "/"), invoke(s, "/nowhere")
	fmt.Printf("invoked by gRPC: %d %s, of nothing: %d\n", found.StatusCode, text(found), missing.StatusCode)
}

func invoke(s *shop, path string) *http.Response {
	request := must(http.NewRequest(http.MethodGet, "http://shop"+path, nil))
	request.Header = canary
	return must(s.app.Invoke(s.id, request))
}

// change changes much while requests go on.
func change(s *shop) {
	stop, done := make(chan bool), make(chan [2]int)
	go func(asking shop) {
		requests, failed := 0, 0
		for {
			select {
			case <-stop:
				done <- [2]int{requests, failed}
				return
			default:
			}
			requests++
			if code, _, err := asking.get("/", nil); err != nil || code != http.StatusOK {
				failed++
			}
		}
	}(*s)
	s.declare(map[string]int32{"a": 1, "b": 1, "c": 1}, &pb.Split{UpstreamId: s.canaryID, Percent: 100})
	fmt.Println("all is split: 9 requests:", s.tally(9, nil))
	some := &pb.Split{UpstreamId: s.canaryID, Header: &pb.HeaderMatch{Name: "x-canary"}}
	s.declare(map[string]int32{"a": 1, "b": 1}, some)
	close(stop)
	counts := <-done
	fmt.Println("nothing is, and c leaves: 10 requests:", s.tally(10, nil))
	fmt.Printf("others went on meanwhile: %t, failed: %d\n", counts[0] > 0, counts[1])
}

func lose(s *shop) {
	check(s.servers["b"].stop())
	fmt.Println("b stops: 9 requests:", s.tally(9, nil))
	counted := stats(s, func(counted *pb.UpstreamStats) bool { return counted.Retries > 0 })
	fmt.Printf("counted: retries: %t, errors: %d\n", counted.Retries > 0, counted.Errors)
}

func drain(s *shop, seen <-chan string) {
	answered := make(chan string)
	go func() {
		code, name, err := s.get("/held", canary)
		check(err)
		answered <- fmt.Sprint(code, " ", name)
	}()
	<-s.servers["d"].held
	drained := must(s.operator.Drain(ctx, s.id, wait, 0))
	fmt.Println("drained with a request under way:", state(drained))
	fmt.Println("the app sees it:", until(seen, "DRAINING"))
	_, _, err := s.get("/", nil)
	fmt.Printf("it dials anew: refused: %t\n", errors.Is(err, syscall.ECONNREFUSED))
	_, err = s.app.Invoke(s.id, must(http.NewRequest(http.MethodGet, "http://shop/", nil)))
	fmt.Println("it invokes by gRPC:", told(err))
	close(s.servers["d"].released)
	fmt.Println("the request under way is answered:", <-answered)
	drained = must(s.operator.Drain(ctx, s.id, wait, wait))
	fmt.Println("connections left:", drained.Status.ActiveConnections)
}

func remove(s *shop, seen <-chan string) {
	_, err := s.operator.Remove(ctx, s.canaryID, 0)
	fmt.Println("removed what it splits to:", told(err))
	removed, again := must(s.operator.Remove(ctx, s.id, 0)), must(s.operator.Remove(ctx, s.id, 0))
	fmt.Printf("removed it: %t, again: %t\n", removed, again)
	fmt.Println("the app sees it:", until(seen, "gone"))
	fmt.Printf("removed the other: %t\n", must(s.operator.Remove(ctx, s.canaryID, 0)))
}

func refused(s *shop, wanted *pb.Upstream) *client.Error {
	_, err := s.operator.Declare(ctx, client.Declaration{Upstream: wanted})
	return client.FromError(err)
}

func state(found *pb.Upstream) string {
	return strings.TrimPrefix(found.Status.State.String(), "UPSTREAM_STATE_")
}

func shares(counts map[string]int64) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%s %d", name, counts[name]))
	}
	return strings.Join(parts, ", ")
}

func text(answer *http.Response) string {
	defer answer.Body.Close()
	return string(must(io.ReadAll(answer.Body)))
}

func told(err error) string {
	if refusal := client.FromError(err); refusal != nil {
		return refusal.CodeName() + " " + refusal.Reason
	}
	return "OK"
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
