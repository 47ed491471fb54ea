package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	ambassadorv1 "retinue/ambassador/v1"
)

// Ambassador is what stands behind localhost: declared, looked at, and waited for. What changes something is for operators:
// it needs a connection to the control socket. Errors are those of the calls.
type Ambassador struct {
	// Client is the server. Required.
	Client ambassadorv1.AmbassadorServiceClient
}

// Declaration is what an upstream is to be.
type Declaration struct {
	// Upstream is all of it; NewUpstream makes a plain one. Required.
	Upstream *ambassadorv1.Upstream
	// Etag lets the declaration count only while the upstream has this one; "none" = only if there is no such upstream.
	Etag string
	// ValidateOnly only checks it.
	ValidateOnly bool
	// Wait is how long to wait until it is ACTIVE or REJECTED, up to 60 s; what is answered says which.
	Wait time.Duration
}

// NotActive says that upstreams were not ACTIVE in time, and of each why not.
type NotActive struct {
	Reasons map[string]string
	cause   error
}

func (n *NotActive) Error() string {
	var reasons []string
	for _, id := range slices.Sorted(maps.Keys(n.Reasons)) {
		reasons = append(reasons, id+": "+n.Reasons[id])
	}
	return strings.Join(reasons, "; ")
}

// Unwrap gives what ended the wait.
func (n *NotActive) Unwrap() error { return n.cause }

// UpstreamAddress is where an upstream is dialled, 127.0.0.1:PORT or unix:PATH, by RETINUE_UPSTREAM_<NAME>_ADDRESS; empty if
// that is not set.
func UpstreamAddress(id string) string {
	name := strings.ToUpper(strings.ReplaceAll(id, "-", "_"))
	return os.Getenv("RETINUE_UPSTREAM_" + name + "_ADDRESS")
}

// NewUpstream is a plain declaration: IP:PORT endpoints, and the local port (0 = a free one).
func NewUpstream(id string, protocol ambassadorv1.Protocol, port int32, endpoints ...string) *ambassadorv1.Upstream {
	static := &ambassadorv1.StaticEndpoints{}
	for _, address := range endpoints {
		static.Endpoints = append(static.Endpoints, &ambassadorv1.Endpoint{Address: address})
	}
	return &ambassadorv1.Upstream{
		UpstreamId: id, Protocol: protocol,
		Listen:    &ambassadorv1.Listen{Address: &ambassadorv1.Listen_Port{Port: port}},
		Discovery: &ambassadorv1.Upstream_Static{Static: static},
	}
}

// Changing

// Declare makes it so. Repeating it is safe.
func (a *Ambassador) Declare(ctx context.Context, wanted Declaration) (*ambassadorv1.Upstream, error) {
	response, err := a.Client.DeclareUpstream(ctx, &ambassadorv1.DeclareUpstreamRequest{
		Upstream: wanted.Upstream, Etag: wanted.Etag, ValidateOnly: wanted.ValidateOnly, WaitDuration: asked(wanted.Wait),
	})
	return response.GetUpstream(), err
}

// SetEndpoints says who serves an upstream whose discovery is pushed.
func (a *Ambassador) SetEndpoints(
	ctx context.Context, id string, endpoints ...*ambassadorv1.Endpoint,
) (*ambassadorv1.Upstream, error) {
	response, err := a.Client.SetEndpoints(ctx, &ambassadorv1.SetEndpointsRequest{UpstreamId: id, Endpoints: endpoints})
	return response.GetUpstream(), err
}

// Drain lets it take no new connections; those that are open are cut when the time is over, 0 = now. It waits for the last of
// them, up to 60 s.
func (a *Ambassador) Drain(ctx context.Context, id string, drain, wait time.Duration) (*ambassadorv1.Upstream, error) {
	response, err := a.Client.DrainUpstream(ctx, &ambassadorv1.DrainUpstreamRequest{
		UpstreamId: id, DrainDuration: durationpb.New(drain), WaitDuration: asked(wait),
	})
	return response.GetUpstream(), err
}

// Remove drains it and forgets it. It tells whether there was one.
func (a *Ambassador) Remove(ctx context.Context, id string, drain time.Duration) (bool, error) {
	response, err := a.Client.RemoveUpstream(ctx, &ambassadorv1.RemoveUpstreamRequest{
		UpstreamId: id, DrainDuration: durationpb.New(drain),
	})
	return response.GetRemoved(), err
}

// Looking

// Get gives it as it is now.
func (a *Ambassador) Get(ctx context.Context, id string) (*ambassadorv1.Upstream, error) {
	response, err := a.Client.GetUpstream(ctx, &ambassadorv1.GetUpstreamRequest{UpstreamId: id})
	return response.GetUpstream(), err
}

// List gives all, by name. An error is the last that comes.
func (a *Ambassador) List(ctx context.Context) iter.Seq2[*ambassadorv1.Upstream, error] {
	return func(yield func(*ambassadorv1.Upstream, error) bool) {
		request := &ambassadorv1.ListUpstreamsRequest{}
		for {
			page, err := a.Client.ListUpstreams(ctx, request)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, found := range page.Upstreams {
				if !yield(found, nil) {
					return
				}
			}
			if request.PageToken = page.NextPageToken; request.PageToken == "" {
				return
			}
		}
	}
}

// DataPlanes tells what carries the bytes, and what it can do.
func (a *Ambassador) DataPlanes(ctx context.Context) ([]*ambassadorv1.DataPlane, error) {
	response, err := a.Client.GetDataPlane(ctx, &ambassadorv1.GetDataPlaneRequest{})
	return response.GetDataPlanes(), err
}

// Watch gives these or all as they are, Synced, then each change, until ctx is done. It begins anew when a connection is lost.
// An error is the last that comes.
func (a *Ambassador) Watch(ctx context.Context, ids ...string) iter.Seq2[*ambassadorv1.WatchUpstreamsResponse, error] {
	request := &ambassadorv1.WatchUpstreamsRequest{UpstreamIds: ids}
	return again(ctx, func(ctx context.Context) (changes, error) { return a.Client.WatchUpstreams(ctx, request) })
}

// Stats gives the counts of these or all, at once and then at an interval (0 = 1 s), until ctx is done. It goes on over lost
// connections. An error is the last that comes.
func (a *Ambassador) Stats(
	ctx context.Context, interval time.Duration, ids ...string,
) iter.Seq2[[]*ambassadorv1.UpstreamStats, error] {
	request := &ambassadorv1.WatchUpstreamStatsRequest{UpstreamIds: ids, IntervalDuration: asked(interval)}
	open := func(ctx context.Context) (counts, error) { return a.Client.WatchUpstreamStats(ctx, request) }
	return func(yield func([]*ambassadorv1.UpstreamStats, error) bool) {
		for response, err := range again(ctx, open) {
			if !yield(response.GetStats(), err) {
				return
			}
		}
	}
}

type (
	changes = grpc.ServerStreamingClient[ambassadorv1.WatchUpstreamsResponse]
	counts  = grpc.ServerStreamingClient[ambassadorv1.WatchUpstreamStatsResponse]
)

// again gives what a stream gives, and opens another one after each that is lost.
func again[T any](
	ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[T], error),
) iter.Seq2[*T, error] {
	return func(yield func(*T, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		wait := firstWait
		for {
			stream, err := open(ctx)
			for err == nil {
				var response *T
				if response, err = stream.Recv(); err == nil {
					wait = firstWait
					if !yield(response, nil) {
						return
					}
				}
			}
			if lost := FromError(err); !errors.Is(err, io.EOF) && lost.Code != codes.Unavailable && lost.RetryAfter == 0 {
				yield(nil, err)
				return
			}
			pause(ctx, wait/2+rand.N(wait/2))
			wait = min(2*wait, longestWait)
		}
	}
}

// Wait returns when all of these are ACTIVE; one that is not declared yet is waited for, and so is a server that is away. When
// ctx is done it returns a *NotActive.
func (a *Ambassador) Wait(ctx context.Context, ids ...string) error {
	if len(ids) == 0 {
		return nil
	}
	waiting := newWaiting(ids)
	for event, err := range a.Watch(ctx, ids...) {
		over := context.Cause(ctx)
		if over == nil && status.Code(err) == codes.DeadlineExceeded { // the server may be the first to say so
			over = context.DeadlineExceeded
		}
		switch {
		case over != nil:
			return &NotActive{Reasons: waiting.left, cause: over}
		case err != nil:
			return err
		}
		if waiting.hear(event); len(waiting.left) == 0 {
			return nil
		}
	}
	return nil
}

const notDeclared = "it is not declared"

// waiting is what a wait has heard.
type waiting struct {
	ids  []string
	left map[string]string // of each that is not active: why
	told map[string]bool   // those of the present snapshot
}

func newWaiting(ids []string) *waiting {
	w := &waiting{ids: ids, left: map[string]string{}, told: map[string]bool{}}
	for _, id := range ids {
		w.left[id] = "the ambassador can't be reached"
	}
	return w
}

func (w *waiting) hear(event *ambassadorv1.WatchUpstreamsResponse) {
	switch event := event.Event.(type) {
	case *ambassadorv1.WatchUpstreamsResponse_Upstream:
		w.told[event.Upstream.UpstreamId] = true
		w.set(event.Upstream.UpstreamId, whyNotActive(event.Upstream))
	case *ambassadorv1.WatchUpstreamsResponse_RemovedUpstreamId:
		w.set(event.RemovedUpstreamId, notDeclared)
	case *ambassadorv1.WatchUpstreamsResponse_Synced:
		for _, id := range w.ids {
			if !w.told[id] {
				w.set(id, notDeclared)
			}
		}
		clear(w.told)
	}
}

func (w *waiting) set(id, why string) {
	delete(w.left, id)
	if why != "" {
		w.left[id] = why
	}
}

// whyNotActive is empty if the latest of it is served.
func whyNotActive(found *ambassadorv1.Upstream) string {
	now := found.GetStatus()
	if rejection := now.GetRejection(); rejection != nil {
		return "it is refused: " + rejection.Message
	}
	if now.GetState() == ambassadorv1.UpstreamState_UPSTREAM_STATE_ACTIVE {
		return ""
	}
	why := "it is " + strings.ToLower(strings.TrimPrefix(now.GetState().String(), "UPSTREAM_STATE_"))
	if !now.GetEndpointsResolved() {
		why += ", and nobody serves it yet"
	}
	return why
}

// Calling

// Invoke makes one HTTP request by the upstream's own listener, for those who have nothing but this connection. Whatever the
// upstream answers is an answer; the request's context counts.
func (a *Ambassador) Invoke(id string, request *http.Request) (*http.Response, error) {
	invoked, err := invocation(id, request)
	if err != nil {
		return nil, err
	}
	answer, err := a.Client.Invoke(request.Context(), invoked)
	if err != nil {
		return nil, err
	}
	code := int(answer.Status)
	response := &http.Response{
		Status: fmt.Sprintf("%d %s", code, http.StatusText(code)), StatusCode: code,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: request,
		Body: io.NopCloser(bytes.NewReader(answer.Body)), ContentLength: int64(len(answer.Body)),
	}
	for _, header := range answer.Headers {
		response.Header.Add(header.Name, header.Value)
	}
	return response, nil
}

func invocation(id string, request *http.Request) (*ambassadorv1.InvokeRequest, error) {
	invoked := &ambassadorv1.InvokeRequest{UpstreamId: id, Method: request.Method, Path: request.URL.RequestURI()}
	if request.Host != "" {
		invoked.Headers = append(invoked.Headers, &ambassadorv1.Header{Name: "host", Value: request.Host})
	}
	for name, values := range request.Header {
		for _, value := range values {
			invoked.Headers = append(invoked.Headers, &ambassadorv1.Header{Name: name, Value: value})
		}
	}
	if request.Body == nil {
		return invoked, nil
	}
	body, err := io.ReadAll(request.Body)
	invoked.Body = body
	return invoked, errors.Join(err, request.Body.Close())
}
