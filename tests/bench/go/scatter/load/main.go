// Command load calls one unary method with the same bytes again and again: a number of callers that each await their answer
// (closed loop), or at times that nobody's answers change (open loop). Each line on stdin is one such run.
package main

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"bench/scatter/lines"
)

type command struct {
	Addresses []string `json:"addresses"` // of several, each call takes the next
	Method    string   `json:"method"`
	Request   []byte   `json:"request"`
	Timeout   float64  `json:"timeout"` // seconds, of a call
	Seconds   float64  `json:"seconds"` // of the run
	Callers   int      `json:"callers"` // of a closed loop; 0 = an open one
	Calls     int      `json:"calls"`   // of a closed loop: as many as there are, instead of seconds
	Rate      float64  `json:"rate"`    // of an open loop, calls a second, at Poisson's times
	SlowMs    float64  `json:"slow_ms"` // what counts as slow
}

type latencies struct {
	Calls  int     `json:"calls"`
	P50    float64 `json:"p50_ms"`
	P90    float64 `json:"p90_ms"`
	P99    float64 `json:"p99_ms"`
	Most   float64 `json:"longest_ms"`
	Slow   int     `json:"slow"`
	Within float64 `json:"seconds"` // from the first call's begin to the last one's end
}

// raw passes bytes through.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	data, ok := v.([]byte)
	if !ok {
		return nil, errors.New("only bytes pass")
	}
	return mem.BufferSlice{mem.SliceBuffer(data)}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	size, ok := v.(*int)
	if !ok {
		return errors.New("only sizes are kept")
	}
	*size = data.Len()
	return nil
}

var _ encoding.CodecV2 = raw{}

// run is one command being done.
type run struct {
	command
	conns []*grpc.ClientConn
	next  atomic.Int64
	lock  sync.Mutex
	took  map[codes.Code][]time.Duration
	begun time.Time
	ended time.Time
}

func (r *run) call() {
	ctx, cancel := context.WithTimeout(context.Background(), seconds(r.Timeout))
	defer cancel()
	conn := r.conns[int(r.next.Add(1))%len(r.conns)]
	begun, size := time.Now(), 0
	code := status.Code(conn.Invoke(ctx, r.Method, r.Request, &size, grpc.ForceCodecV2(raw{})))
	ended := time.Now()
	r.lock.Lock()
	defer r.lock.Unlock()
	r.took[code] = append(r.took[code], ended.Sub(begun))
	r.ended = ended
}

func (r *run) closed() {
	var callers sync.WaitGroup
	var begun atomic.Int64
	end := r.begun.Add(seconds(r.Seconds))
	for range r.Callers {
		callers.Go(func() {
			for (r.Calls > 0 && begun.Add(1) <= int64(r.Calls)) || (r.Calls == 0 && time.Now().Before(end)) {
				r.call()
			}
		})
	}
	callers.Wait()
}

func (r *run) open() {
	var calls sync.WaitGroup
	due, end := r.begun, r.begun.Add(seconds(r.Seconds))
	for {
		due = due.Add(seconds(rand.ExpFloat64() / r.Rate))
		if due.After(end) {
			break
		}
		time.Sleep(time.Until(due))
		calls.Go(r.call)
	}
	calls.Wait()
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func (r *run) told() map[string]latencies {
	found := map[string]latencies{}
	for code, took := range r.took {
		slices.Sort(took)
		at := func(share float64) float64 {
			return ms(took[min(len(took)-1, int(share*float64(len(took))))])
		}
		slow, _ := slices.BinarySearchFunc(took, r.SlowMs, func(t time.Duration, most float64) int {
			return cmp.Compare(ms(t), most)
		})
		name := code.String()
		found[name] = latencies{len(took), at(0.5), at(0.9), at(0.99), ms(took[len(took)-1]), len(took) - slow, r.ended.Sub(r.begun).Seconds()}
	}
	return found
}

func ms(t time.Duration) float64 { return t.Seconds() * 1000 }

func (c command) do() any {
	r := &run{command: c, took: map[codes.Code][]time.Duration{}}
	for _, address := range c.Addresses {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
		lines.Check(err)
		conn.Connect()
		r.conns = append(r.conns, conn)
		defer conn.Close()
	}
	r.begun = time.Now()
	if c.Callers > 0 {
		r.closed()
	} else {
		r.open()
	}
	return r.told()
}

func main() {
	lines.Say(map[string]bool{"ready": true})
	lines.Serve(command.do)
}
