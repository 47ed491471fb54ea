// Command leaf serves LeafService on so many ports and echoes payloads. A payload that is a JSON object says how long to
// take: `work_ms` (exponentially distributed), one query of a port after the other if `serial`, and for a share `slow` of all
// queries `slow_ms` more. Every line on stdin is answered with how many queries have come, and how many of them nobody waited
// for to the end.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"bench/scatter/lines"
	leafpb "retinue/scattergather/v1"
)

type behaviour struct {
	WorkMs float64 `json:"work_ms"`
	Slow   float64 `json:"slow"`
	SlowMs float64 `json:"slow_ms"`
	Serial bool    `json:"serial"`
}

var queries, cancelled atomic.Int64

// leaf is one port.
type leaf struct {
	leafpb.UnimplementedLeafServiceServer
	free chan struct{} // has one thing in it while nobody is served serially
}

func (l *leaf) Query(ctx context.Context, request *leafpb.QueryRequest) (*leafpb.QueryResponse, error) {
	queries.Add(1)
	if payload := request.Payload; len(payload) > 0 && payload[0] == '{' {
		if err := l.behave(ctx, payload); err != nil {
			cancelled.Add(1)
			return nil, status.FromContextError(err).Err()
		}
	}
	return &leafpb.QueryResponse{Payload: request.Payload}, nil
}

// behave takes its time, unless nobody waits any more.
func (l *leaf) behave(ctx context.Context, payload []byte) error {
	var b behaviour
	lines.Check(json.Unmarshal(payload, &b))
	if b.Slow > 0 && rand.Float64() < b.Slow {
		if err := sleep(ctx, b.SlowMs); err != nil {
			return err
		}
	}
	if b.Serial {
		select {
		case <-l.free:
			defer func() { l.free <- struct{}{} }()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return sleep(ctx, b.WorkMs*rand.ExpFloat64())
}

func sleep(ctx context.Context, ms float64) error {
	timer := time.NewTimer(time.Duration(ms * float64(time.Millisecond)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stream is one QueryStream: its queries, by number, and one writer at a time.
type stream struct {
	leaf    *leaf
	grpc    grpc.BidiStreamingServer[leafpb.QueryStreamRequest, leafpb.QueryStreamResponse]
	writing sync.Mutex
	lock    sync.Mutex
	open    map[uint64]context.CancelFunc
}

func (l *leaf) QueryStream(s grpc.BidiStreamingServer[leafpb.QueryStreamRequest, leafpb.QueryStreamResponse]) error {
	one := &stream{leaf: l, grpc: s, open: map[uint64]context.CancelFunc{}}
	for {
		request, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		one.take(request)
	}
}

func (s *stream) take(request *leafpb.QueryStreamRequest) {
	if request.Query == nil {
		s.forget(request.QueryId)
		return
	}
	if payload := request.Query.Payload; len(payload) == 0 || payload[0] != '{' {
		s.answer(s.grpc.Context(), request) // it does not wait: no goroutine
		return
	}
	ctx, cancel := context.WithTimeout(s.grpc.Context(), time.Duration(request.TimeoutMicros)*time.Microsecond)
	s.lock.Lock()
	s.open[request.QueryId] = cancel
	s.lock.Unlock()
	go func() {
		defer s.forget(request.QueryId)
		s.answer(ctx, request)
	}()
}

func (s *stream) forget(id uint64) {
	s.lock.Lock()
	defer s.lock.Unlock()
	if cancel, ok := s.open[id]; ok {
		cancel()
		delete(s.open, id)
	}
}

func (s *stream) answer(ctx context.Context, request *leafpb.QueryStreamRequest) {
	response := &leafpb.QueryStreamResponse{QueryId: request.QueryId}
	found, err := s.leaf.Query(ctx, request.Query)
	if ctx.Err() != nil {
		return // nobody waits
	}
	if err != nil {
		response.Code, response.Message = int32(status.Code(err)), err.Error()
	}
	response.Response = found
	s.writing.Lock()
	defer s.writing.Unlock()
	_ = s.grpc.Send(response) // a stream that has ended says so where it is read
}

// serve begins to serve on a port, and says which.
func serve() string {
	one := &leaf{free: make(chan struct{}, 1)}
	one.free <- struct{}{}
	server := grpc.NewServer(grpc.MaxConcurrentStreams(1 << 20))
	leafpb.RegisterLeafServiceServer(server, one)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	lines.Check(err)
	go func() { lines.Check(server.Serve(listener)) }()
	return listener.Addr().String()
}

func main() {
	ports := flag.Int("ports", 1, "how many endpoints")
	flag.Parse()
	var addresses []string
	for range *ports {
		addresses = append(addresses, serve())
	}
	lines.Say(map[string]any{"addresses": addresses})
	lines.Serve(func(struct{}) any {
		return map[string]int64{"queries": queries.Load(), "cancelled": cancelled.Load()}
	})
}
