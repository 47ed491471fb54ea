package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	pb "retinue/workqueue/v1"
)

// The lines of a history; see tests/support/history/records.py.

type item struct {
	Task     string `json:"task"`
	Epoch    int64  `json:"epoch"`
	LastsMs  int64  `json:"lasts_ms,omitempty"`
	FollowUp int    `json:"follow_ups,omitempty"`
	Final    bool   `json:"final,omitempty"`
}

type call struct {
	Type   string `json:"type"`
	At     int64  `json:"at"`
	Who    string `json:"who"`
	N      int64  `json:"n"`
	Op     string `json:"op"`
	Items  []item `json:"items,omitempty"`
	Stream int64  `json:"stream,omitempty"`
}

type reply struct {
	Type    string         `json:"type"`
	At      int64          `json:"at"`
	Who     string         `json:"who"`
	N       int64          `json:"n"`
	Outcome string         `json:"outcome"`
	Refused map[int]string `json:"refused,omitempty"`
	Reason  string         `json:"reason,omitempty"`
}

type grant struct {
	Task    string `json:"task"`
	Epoch   int64  `json:"epoch"`
	Attempt int32  `json:"attempt"`
	LastsMs int64  `json:"lasts_ms"`
}

type leased struct {
	Type   string  `json:"type"`
	At     int64   `json:"at"`
	Who    string  `json:"who"`
	N      int64   `json:"n"`
	Since  int64   `json:"since"`
	Leases []grant `json:"leases"`
}

// recorder appends lines to a file; each is handed to the kernel at once, so that it outlives a SIGKILL.
type recorder struct {
	who  string
	mu   sync.Mutex
	file *os.File
	last int64
	held map[string]item // by lease token
}

func open(directory, who string) (*recorder, error) {
	file, err := os.OpenFile(filepath.Join(directory, who+".jsonl"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	return &recorder{who: who, file: file, held: map[string]item{}}, err
}

func now() int64 {
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		log.Fatal(err)
	}
	return boot.Nano()
}

func (r *recorder) write(event any) {
	line, err := json.Marshal(event)
	if err == nil {
		_, err = r.file.Write(append(line, '\n'))
	}
	if err != nil {
		log.Fatal(err) // a history with holes proves nothing
	}
}

// call notes a call before it is sent, and gives its number.
func (r *recorder) call(op string, items []item, stream int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	r.write(call{"call", now(), r.who, r.last, op, items, stream})
	return r.last
}

func (r *recorder) ok(n int64, refused map[int]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.write(reply{"reply", now(), r.who, n, "ok", refused, ""})
}

func (r *recorder) unknown(n int64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.write(reply{"reply", now(), r.who, n, "unknown", nil, status.Code(err).String()})
}

func (r *recorder) leased(n, since int64, leases []*pb.Lease) {
	r.mu.Lock()
	defer r.mu.Unlock()
	grants := make([]grant, len(leases))
	for i, lease := range leases {
		grants[i] = grant{lease.TaskId, lease.LeaseEpoch, lease.Attempt, lease.LeaseDuration.AsDuration().Milliseconds()}
		r.held[string(lease.LeaseToken)] = item{Task: lease.TaskId, Epoch: lease.LeaseEpoch}
	}
	r.write(leased{"leased", now(), r.who, n, since, grants})
}

func (r *recorder) item(token []byte) item {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held[string(token)]
}

// asked is one kind of outcome in a request, as a call of the history.
type asked struct {
	op     string
	items  []item
	tokens []string
}

func (a *asked) add(token []byte, one item) {
	a.items, a.tokens = append(a.items, one), append(a.tokens, string(token))
}

func (r *recorder) outcomes(completions []*pb.Completion, failures []*pb.TaskFailure, releases []*pb.Release) []*asked {
	complete, fail, release := &asked{op: "complete"}, &asked{op: "fail"}, &asked{op: "release"}
	for _, one := range completions {
		what := r.item(one.LeaseToken)
		what.FollowUp = len(one.FollowUps)
		complete.add(one.LeaseToken, what)
	}
	for _, one := range failures {
		what := r.item(one.LeaseToken)
		what.Final = one.Final
		fail.add(one.LeaseToken, what)
	}
	for _, one := range releases {
		release.add(one.LeaseToken, r.item(one.LeaseToken))
	}
	var found []*asked
	for _, one := range []*asked{complete, fail, release} {
		if len(one.items) > 0 {
			found = append(found, one)
		}
	}
	return found
}

// Unary calls

func (r *recorder) unary(
	ctx context.Context, method string, request, response any, channel *grpc.ClientConn, next grpc.UnaryInvoker, options ...grpc.CallOption,
) error {
	what := r.asked(request)
	n := r.call(what.op, what.items, 0)
	if err := next(ctx, method, request, response, channel, options...); err != nil {
		r.unknown(n, err)
		return err
	}
	r.ok(n, refusals(response))
	return nil
}

func (r *recorder) asked(request any) *asked {
	switch request := request.(type) {
	case *pb.CompleteTasksRequest:
		return r.outcomes(request.Completions, nil, nil)[0]
	case *pb.FailTasksRequest:
		return r.outcomes(nil, request.Failures, nil)[0]
	case *pb.ReleaseTasksRequest:
		return r.outcomes(nil, nil, request.Releases)[0]
	case *pb.ExtendLeasesRequest:
		extend := &asked{op: "extend"}
		for _, one := range request.Extensions {
			extend.add(one.LeaseToken, r.item(one.LeaseToken))
		}
		return extend
	}
	log.Fatalf("a worker has no call for %T", request)
	return nil
}

func refusals(response any) map[int]string {
	refused := map[int]string{}
	note := func(i int, status *pb.ItemStatus) {
		if status.GetCode() != 0 {
			refused[i] = status.Reason
		}
	}
	switch response := response.(type) {
	case *pb.CompleteTasksResponse:
		for i, result := range response.Results {
			note(i, result.Status)
		}
	case *pb.FailTasksResponse:
		for i, result := range response.Results {
			note(i, result.Status)
		}
	case *pb.ReleaseTasksResponse:
		for i, result := range response.Results {
			note(i, result.Status)
		}
	case *pb.ExtendLeasesResponse:
		for i, result := range response.Results {
			note(i, result.Status)
		}
	}
	return refused
}

// Streams

type stream struct {
	grpc.ClientStream
	record  *recorder
	n       int64
	lastsMs int64

	mu      sync.Mutex
	credit  []credit
	pending map[int64][]waiting // by sequence
	idle    map[string]item     // leases that came here and were not settled yet, by token
}

type credit struct{ at, count int64 }

type waiting struct {
	n int64
	*asked
}

func (r *recorder) stream(
	ctx context.Context, desc *grpc.StreamDesc, channel *grpc.ClientConn, method string, next grpc.Streamer, options ...grpc.CallOption,
) (grpc.ClientStream, error) {
	n := r.call("lease", nil, 0)
	inner, err := next(ctx, desc, channel, method, options...)
	if err != nil {
		r.unknown(n, err)
		return nil, err
	}
	return &stream{ClientStream: inner, record: r, n: n, pending: map[int64][]waiting{}, idle: map[string]item{}}, nil
}

func (s *stream) SendMsg(message any) error {
	request := message.(*pb.StreamTasksRequest)
	s.mu.Lock()
	if request.Open != nil {
		s.lastsMs = request.Open.LeaseDuration.AsDuration().Milliseconds()
	}
	if request.Credit > 0 {
		s.credit = append(s.credit, credit{now(), int64(request.Credit)})
	}
	all := s.record.outcomes(request.Completions, request.Failures, request.Releases)
	for _, one := range all {
		for _, token := range one.tokens {
			delete(s.idle, token)
		}
	}
	if request.ExtendAll && len(s.idle) > 0 {
		all = append(all, s.extension())
	}
	for _, one := range all {
		n := s.record.call(one.op, one.items, s.n)
		s.pending[request.Sequence] = append(s.pending[request.Sequence], waiting{n, one})
	}
	s.mu.Unlock()
	return s.ClientStream.SendMsg(message)
}

func (s *stream) extension() *asked {
	extend := &asked{op: "extend"}
	for token, one := range s.idle {
		one.LastsMs = s.lastsMs
		extend.add([]byte(token), one)
	}
	return extend
}

func (s *stream) RecvMsg(message any) error {
	err := s.ClientStream.RecvMsg(message)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.end(err)
		return err
	}
	response := message.(*pb.StreamTasksResponse)
	if leases := response.GetLeases().GetLeases(); len(leases) > 0 {
		s.take(leases)
	}
	if settled := response.GetSettled(); settled != nil {
		s.answer(settled)
	}
	return nil
}

func (s *stream) end(err error) {
	for _, all := range s.pending {
		for _, one := range all {
			s.record.unknown(one.n, err)
		}
	}
	if errors.Is(err, io.EOF) {
		s.record.ok(s.n, nil)
	} else {
		s.record.unknown(s.n, err)
	}
}

// take notes leases with when the credit was sent that the first of them uses up.
func (s *stream) take(leases []*pb.Lease) {
	since := s.credit[0].at
	s.record.leased(s.n, since, leases)
	for left := int64(len(leases)); left > 0; {
		used := min(left, s.credit[0].count)
		s.credit[0].count -= used
		left -= used
		if s.credit[0].count == 0 {
			s.credit = s.credit[1:]
		}
	}
	for _, lease := range leases {
		s.idle[string(lease.LeaseToken)] = item{Task: lease.TaskId, Epoch: lease.LeaseEpoch}
	}
}

func (s *stream) answer(settled *pb.StreamSettled) {
	why := map[string]string{}
	for _, refused := range settled.Errors {
		why[string(refused.LeaseToken)] = refused.Status.Reason
	}
	for _, token := range settled.LostLeaseTokens {
		why[string(token)] = "LEASE_LOST"
		delete(s.idle, string(token))
	}
	for _, one := range s.pending[settled.Sequence] {
		refused := map[int]string{}
		for i, token := range one.tokens {
			if reason := why[token]; reason != "" {
				refused[i] = reason
			}
		}
		s.record.ok(one.n, refused)
	}
	delete(s.pending, settled.Sequence)
}
