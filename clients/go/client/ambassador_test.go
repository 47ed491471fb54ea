package client_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "retinue/ambassador/v1"
	"retinue/client"
)

// embassy is a real ambassador that has Envoy and may dial loopback; its upstream is gone after the test.
type embassy struct {
	*testing.T
	app, operator *client.Ambassador
	id            string
	links         *links // of the app
}

func newEmbassy(t *testing.T) *embassy {
	if os.Getenv("RETINUE_ADDRESS") == "" || os.Getenv("RETINUE_CONTROL_ADDRESS") == "" {
		t.Fatal("cannot test: set RETINUE_ADDRESS and RETINUE_CONTROL_ADDRESS to those of a running server")
	}
	e := &embassy{T: t, links: &links{}, id: fmt.Sprintf("go-%d", time.Now().UnixNano())}
	e.app = e.dial("ambassador", grpc.WithContextDialer(e.links.dial))
	e.operator = e.dial("control")
	t.Cleanup(func() { e.operator.Remove(context.Background(), e.id, 0) })
	return e
}

func (e *embassy) dial(name string, options ...grpc.DialOption) *client.Ambassador {
	channel, err := client.Dial(name, options...)
	if err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() { channel.Close() })
	return &client.Ambassador{Client: pb.NewAmbassadorServiceClient(channel)}
}

func (e *embassy) declare(wanted *pb.Upstream) *pb.Upstream {
	e.Helper()
	found, err := e.operator.Declare(e.Context(), client.Declaration{Upstream: wanted, Wait: 20 * time.Second})
	if err != nil {
		e.Fatal(err)
	}
	return found
}

// tcp is an upstream over a server that answers each line with its name and the line.
func (e *embassy) tcp(name string) *pb.Upstream {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		e.Fatal(err)
	}
	e.Cleanup(func() { listener.Close() })
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer connection.Close()
				for lines := bufio.NewScanner(connection); lines.Scan(); {
					fmt.Fprintln(connection, name, lines.Text())
				}
			}()
		}
	}()
	return client.NewUpstream(e.id, pb.Protocol_PROTOCOL_TCP, 0, listener.Addr().String())
}

// unserved is an upstream of which nobody is known.
func (e *embassy) unserved() *pb.Upstream {
	nowhere := &pb.Upstream_File{File: &pb.FileDiscovery{Path: "/nonexistent"}}
	return &pb.Upstream{UpstreamId: e.id, Protocol: pb.Protocol_PROTOCOL_TCP, Discovery: nowhere}
}

func (e *embassy) say(address, line string) string {
	e.Helper()
	connection, err := net.Dial("tcp", address)
	if err != nil {
		e.Fatal(err)
	}
	defer connection.Close()
	fmt.Fprintln(connection, line)
	answer, err := bufio.NewReader(connection).ReadString('\n')
	if err != nil {
		e.Fatal(err)
	}
	return strings.TrimSuffix(answer, "\n")
}

func TestADeclaredUpstreamIsServedFoundListedAndCounted(t *testing.T) {
	e := newEmbassy(t)
	declared := e.declare(e.tcp("one"))
	expect(t, "its state", declared.Status.State, pb.UpstreamState_UPSTREAM_STATE_ACTIVE)
	expect(t, "what it answers", e.say(declared.Status.Address, "x"), "one x")
	found, err := e.app.Get(t.Context(), e.id)
	expect(t, "the error", err, nil)
	expect(t, "its etag", found.Etag, declared.Etag)
	listed := 0
	for one, err := range e.app.List(t.Context()) {
		expect(t, "the error", err, nil)
		if one.UpstreamId == e.id {
			listed++
		}
	}
	expect(t, "how often it is listed", listed, 1)
	for snapshot, err := range e.app.Stats(t.Context(), 100*time.Millisecond, e.id) {
		if err != nil {
			t.Fatal(err)
		}
		if snapshot[0].Requests == 1 {
			break
		}
	}
}

func TestTheDataPlanesTellWhatTheyCan(t *testing.T) {
	planes, err := newEmbassy(t).app.DataPlanes(t.Context())
	expect(t, "the error", err, nil)
	can := map[string]bool{}
	for _, plane := range planes {
		for _, one := range plane.Capabilities {
			can[one.Protocol.String()+" "+one.Name] = true
		}
	}
	expect(t, "whether memcached is sharded", can["PROTOCOL_MEMCACHED policy.load_balancing.balancer=KETAMA"], true)
}

func TestARefusedDeclarationSaysWhy(t *testing.T) {
	e := newEmbassy(t)
	forbidden := client.NewUpstream(e.id, pb.Protocol_PROTOCOL_TCP, 0, "169.254.169.254:80")
	_, err := e.operator.Declare(t.Context(), client.Declaration{Upstream: forbidden})
	refusal := client.FromError(err)
	expect(t, "the code", refusal.Code, codes.PermissionDenied)
	expect(t, "the reason", refusal.Reason, "ENDPOINT_FORBIDDEN")
	expect(t, "the address", refusal.Metadata["address"], "169.254.169.254:80")
	named := client.NewUpstream(e.id, pb.Protocol_PROTOCOL_TCP, 0, "example.com:80")
	_, err = e.operator.Declare(t.Context(), client.Declaration{Upstream: named})
	expect(t, "the field", client.FromError(err).Fields[0].Path, "upstream.static.endpoints[0].address")
	first := e.declare(e.tcp("one"))
	_, err = e.operator.Declare(t.Context(), client.Declaration{Upstream: e.tcp("two"), Etag: "none"})
	refusal = client.FromError(err)
	expect(t, "the reason", refusal.Reason, "STALE_ETAG")
	expect(t, "the etag", refusal.Metadata["etag"], first.Etag)
}

func TestADeclarationThatIsOnlyCheckedDeclaresNothing(t *testing.T) {
	e := newEmbassy(t)
	_, err := e.operator.Declare(t.Context(), client.Declaration{Upstream: e.tcp("one"), ValidateOnly: true})
	expect(t, "the error", err, nil)
	_, err = e.app.Get(t.Context(), e.id)
	expect(t, "the reason", client.FromError(err).Reason, "UPSTREAM_NOT_FOUND")
}

func TestPushedEndpointsServeOnceTheyAreSet(t *testing.T) {
	e := newEmbassy(t)
	static := e.tcp("one")
	pushed := proto.CloneOf(static)
	pushed.Discovery = &pb.Upstream_Pushed{Pushed: &pb.PushedEndpoints{}}
	e.declare(pushed)
	set, err := e.operator.SetEndpoints(t.Context(), e.id, static.GetStatic().Endpoints...)
	expect(t, "the error", err, nil)
	e.declare(pushed) // which waits until it is served
	expect(t, "what it answers", e.say(set.Status.Address, "x"), "one x")
}

func TestToWaitEndsWhenAllAreActive(t *testing.T) {
	e := newEmbassy(t)
	over := make(chan error, 1)
	go func() { over <- e.app.Wait(t.Context(), e.id) }()
	e.declare(e.tcp("one"))
	expect(t, "what it returns", within(t, over), nil)
	expect(t, "what it returns for none", e.app.Wait(t.Context()), nil)
}

func TestToWaitSaysOfEachWhyItIsNotActive(t *testing.T) {
	e := newEmbassy(t)
	if _, err := e.operator.Declare(t.Context(), client.Declaration{Upstream: e.unserved()}); err != nil {
		t.Fatal(err)
	}
	waiting, stop := context.WithTimeout(t.Context(), 5*time.Second)
	defer stop()
	err := e.app.Wait(waiting, e.id, "nowhere")
	var late *client.NotActive
	expect(t, "that it is late", errors.As(err, &late) && errors.Is(err, context.DeadlineExceeded), true)
	expect(t, "why", err.Error(), e.id+": it is pending, and nobody serves it yet; nowhere: it is not declared")
}

func TestToWaitForAServerThatIsAwayEndsInTime(t *testing.T) {
	e := newEmbassy(t)
	e.links.die()
	waiting, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer stop()
	expect(t, "why", e.app.Wait(waiting, "db").Error(), "db: the ambassador can't be reached")
}

func TestAWatchGoesOnWhenItsConnectionIsCut(t *testing.T) {
	e := newEmbassy(t)
	snapshots := 0
	for event, err := range e.app.Watch(t.Context(), e.id) {
		if err != nil {
			t.Fatal(err)
		}
		if event.GetSynced() != nil {
			snapshots++
			e.links.cut()
		}
		if snapshots == 2 {
			break
		}
	}
}

func TestWhatIsRefusedEndsAStream(t *testing.T) {
	e := newEmbassy(t)
	var told []string
	for _, err := range e.app.Stats(t.Context(), 0, e.id) {
		told = append(told, client.FromError(err).Reason)
	}
	expect(t, "what it tells", strings.Join(told, " "), "UPSTREAM_NOT_FOUND")
	watching, stop := context.WithCancel(t.Context())
	stop()
	told = nil
	for _, err := range e.app.Watch(watching) {
		told = append(told, client.FromError(err).CodeName())
	}
	expect(t, "what a watch tells that is cancelled", strings.Join(told, " "), "CANCELLED")
}

func TestADrainedUpstreamIsRemovedOnce(t *testing.T) {
	e := newEmbassy(t)
	address := e.declare(e.tcp("one")).Status.Address
	drained, err := e.operator.Drain(t.Context(), e.id, time.Second, 20*time.Second)
	expect(t, "the error", err, nil)
	expect(t, "its state", drained.Status.State, pb.UpstreamState_UPSTREAM_STATE_DRAINING)
	_, err = net.Dial("tcp", address)
	expect(t, "that it is refused", err != nil, true)
	removed, err := e.operator.Remove(t.Context(), e.id, 0)
	expect(t, "the error", err, nil)
	expect(t, "whether there was one", removed, true)
	for event, err := range e.app.Watch(t.Context(), e.id) {
		if err != nil {
			t.Fatal(err)
		}
		if event.GetUpstream() == nil { // it is gone, or was not there any more
			break
		}
	}
	removed, err = e.operator.Remove(t.Context(), e.id, 0)
	expect(t, "the error", err, nil)
	expect(t, "whether there was one", removed, false)
}

func TestAnInvokedRequestArrivesAsItWasAndItsAnswerComesBack(t *testing.T) {
	e := newEmbassy(t)
	web := httptest.NewServer(http.HandlerFunc(func(writer http.ResponseWriter, request *http.Request) {
		body, _ := io.ReadAll(request.Body)
		writer.Header().Add("X-Two", "a")
		writer.Header().Add("X-Two", "b")
		writer.WriteHeader(http.StatusTeapot)
		fmt.Fprint(writer, request.Method, " ", request.URL, " ", request.Host, " ", request.Header["X-One"], " ", string(body))
	}))
	t.Cleanup(web.Close)
	e.declare(client.NewUpstream(e.id, pb.Protocol_PROTOCOL_HTTP, 0, web.Listener.Addr().String()))
	request, err := http.NewRequest(http.MethodPost, "http://example.com/a?b=%20c", strings.NewReader("body"))
	expect(t, "the error", err, nil)
	request.Header["X-One"] = []string{"1", "2"}
	answer, err := e.app.Invoke(e.id, request)
	if err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(answer.Body)
	expect(t, "the error", err, nil)
	expect(t, "its status", answer.Status, "418 I'm a teapot")
	expect(t, "its headers", strings.Join(answer.Header.Values("X-Two"), " "), "a b")
	expect(t, "what came", string(said), "POST /a?b=%20c example.com [1 2] body")
	_, err = e.app.Invoke("nowhere", request.Clone(t.Context()))
	expect(t, "the reason", client.FromError(err).Reason, "UPSTREAM_NOT_FOUND")
}

func TestTheEnvironmentNamesAnUpstream(t *testing.T) {
	t.Setenv("RETINUE_UPSTREAM_DB_EU_ADDRESS", "127.0.0.1:5432")
	expect(t, "its address", client.UpstreamAddress("db-eu"), "127.0.0.1:5432")
	expect(t, "another's", client.UpstreamAddress("db"), "")
}
