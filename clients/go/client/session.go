package client

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	workqueuev1 "retinue/workqueue/v1"
)

// session is one stream with the leases that came on it. Those outlive it: they are then renewed and settled by calls.
type session struct {
	worker    *Worker
	stream    grpc.BidiStreamingClient[workqueuev1.StreamTasksRequest, workqueuev1.StreamTasksResponse]
	breakOff  context.CancelFunc
	draining  chan struct{} // closed when the server is stopping
	dead      chan struct{} // closed when no more answers come
	failure   *Error        // why it ended; nil if the server closed it. Set before dead is closed
	unsettled sync.WaitGroup

	sending sync.Mutex
	closed  bool // nothing may be sent any more

	mu       sync.Mutex
	sequence int64
	interval time.Duration // between renewals: a third of the shortest lease
	renewal  *time.Ticker
	waiting  map[int64]chan *workqueuev1.StreamSettled
	held     map[string]*held // by lease token
}

// held is a lease in this worker's hands.
type held struct {
	lease   *workqueuev1.Lease
	alive   context.Context // ends when the lease does
	handler context.Context // ends with alive, when the task is cancelled, at the attempt's deadline, or with the grace
	lose    context.CancelCauseFunc
	stop    context.CancelCauseFunc
	expiry  *time.Timer
	forget  func() // frees what the handler's context holds
}

func (w *Worker) open() (*session, error) {
	ctx, breakOff := context.WithCancel(w.life)
	stream, err := w.Client.StreamTasks(ctx)
	if err != nil {
		breakOff()
		return nil, err
	}
	s := &session{
		worker: w, stream: stream, breakOff: breakOff, draining: make(chan struct{}), dead: make(chan struct{}),
		interval: longestRenewal, renewal: time.NewTicker(longestRenewal),
		waiting: map[int64]chan *workqueuev1.StreamSettled{}, held: map[string]*held{},
	}
	open := &workqueuev1.StreamOpen{QueueId: w.Queue, WorkerId: w.ID}
	if w.LeaseDuration != 0 {
		open.LeaseDuration = durationpb.New(w.LeaseDuration)
	}
	_ = s.send(&workqueuev1.StreamTasksRequest{Open: open}) // a broken stream shows in receive
	return s, nil
}

func (s *session) send(request *workqueuev1.StreamTasksRequest) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	if s.closed {
		return io.EOF
	}
	return s.stream.Send(request)
}

func (s *session) receive() {
	for {
		response, err := s.stream.Recv()
		if err != nil {
			s.end(err)
			return
		}
		switch event := response.Event.(type) {
		case *workqueuev1.StreamTasksResponse_Leases:
			s.begin(event.Leases.Leases)
		case *workqueuev1.StreamTasksResponse_Settled:
			s.answer(event.Settled)
		case *workqueuev1.StreamTasksResponse_Draining:
			s.drain()
		}
	}
}

// end notes why the stream broke. An outcome that the server finds malformed ends it, too: that is no reason not to connect
// again, because outcomes that are left are settled by calls, one by one.
func (s *session) end(err error) {
	s.mu.Lock()
	asked := len(s.waiting) > 0
	s.mu.Unlock()
	if !errors.Is(err, io.EOF) {
		s.failure = FromError(err)
		if asked && s.failure.Code == codes.InvalidArgument {
			s.failure.Code = codes.Aborted
		}
	}
	close(s.dead)
}

func (s *session) drain() {
	select {
	case <-s.draining:
	default:
		close(s.draining)
	}
}

func (s *session) begin(leases []*workqueuev1.Lease) {
	if !s.worker.take(s, len(leases)) {
		go s.giveBack(leases)
		return
	}
	for _, lease := range leases {
		go s.worker.work(s, s.hold(lease))
	}
}

// giveBack releases what came after the worker stopped taking.
func (s *session) giveBack(leases []*workqueuev1.Lease) {
	var releases []*workqueuev1.Release
	for _, lease := range leases {
		releases = append(releases, &workqueuev1.Release{LeaseToken: lease.LeaseToken})
	}
	ctx, cancel := context.WithTimeout(s.worker.life, callTimeout)
	defer cancel()
	request := &workqueuev1.ReleaseTasksRequest{Releases: releases}
	if _, err := s.worker.Client.ReleaseTasks(ctx, request); err != nil {
		s.worker.Log.Warn("unworked tasks were not given back and wait for their leases to expire", "error", err)
	}
}

func (s *session) hold(lease *workqueuev1.Lease) *held {
	alive, lose := context.WithCancelCause(s.worker.life)
	handler, stop := context.WithCancelCause(alive)
	unlink := context.AfterFunc(s.worker.soft, func() { stop(ErrStopping) })
	h := &held{lease: lease, alive: alive, handler: handler, lose: lose, stop: stop, forget: func() { unlink() }}
	if limit := lease.AttemptDuration; limit != nil {
		deadline := time.AfterFunc(limit.AsDuration(), func() { stop(context.DeadlineExceeded) })
		h.forget = func() { unlink(); deadline.Stop() }
	}
	duration := lease.LeaseDuration.AsDuration()
	h.expiry = time.AfterFunc(duration, func() { lose(ErrLeaseLost) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[string(lease.LeaseToken)] = h
	if third := max(duration/3, time.Millisecond); third < s.interval {
		s.interval = third
		s.renewal.Reset(third)
	}
	return h
}

func (s *session) drop(h *held) {
	s.mu.Lock()
	delete(s.held, string(h.lease.LeaseToken))
	s.mu.Unlock()
	h.expiry.Stop()
	h.forget()
	h.lose(nil)
}

func (s *session) heldNow() []*held {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*held, 0, len(s.held))
	for _, h := range s.held {
		all = append(all, h)
	}
	return all
}

func (s *session) intervalNow() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.interval
}

// ask sends a request that is answered by `settled`; false if the stream is dead.
func (s *session) ask(request *workqueuev1.StreamTasksRequest) (*workqueuev1.StreamSettled, bool) {
	answer := make(chan *workqueuev1.StreamSettled, 1)
	s.mu.Lock()
	s.sequence++
	request.Sequence = s.sequence
	s.waiting[request.Sequence] = answer
	s.mu.Unlock()
	if s.send(request) != nil {
		<-s.dead
	}
	select {
	case settled := <-answer:
		return settled, true
	case <-s.dead:
		return nil, false
	}
}

func (s *session) answer(settled *workqueuev1.StreamSettled) {
	s.mu.Lock()
	answer := s.waiting[settled.Sequence]
	delete(s.waiting, settled.Sequence)
	s.mu.Unlock()
	if answer != nil {
		answer <- settled
	}
}

// settle says one outcome: on the stream while it lives, else by a call.
func (s *session) settle(ctx context.Context, o outcome) *Error {
	if settled, ok := s.ask(o.onStream()); ok {
		if len(settled.Errors) > 0 {
			return FromItem(settled.Errors[0].Status)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return o.byCall(ctx, s.worker.Client)
}

// renew extends the leases at a third of their duration. Asking also shows a server that no longer answers.
func (s *session) renew() {
	defer s.renewal.Stop()
	for {
		select {
		case <-s.worker.soft.Done():
			return
		case <-s.renewal.C:
		}
		sent, held, interval := time.Now(), s.heldNow(), s.intervalNow()
		late := time.AfterFunc(interval, s.breakOff)
		settled, ok := s.ask(&workqueuev1.StreamTasksRequest{ExtendAll: true})
		late.Stop()
		switch {
		case ok:
			s.prolong(held, sent, settled)
		case len(held) == 0:
			return
		default:
			s.extendByCall(held, sent, interval)
		}
	}
}

func (s *session) prolong(held []*held, sent time.Time, settled *workqueuev1.StreamSettled) {
	for _, h := range held {
		if slices.ContainsFunc(settled.LostLeaseTokens, func(token []byte) bool { return slices.Equal(token, h.lease.LeaseToken) }) {
			h.lose(ErrLeaseLost)
			continue
		}
		h.expiry.Reset(time.Until(sent.Add(h.lease.LeaseDuration.AsDuration())))
		if slices.Contains(settled.CancelRequestedTaskIds, h.lease.TaskId) {
			h.stop(ErrCancelled)
		}
	}
}

func (s *session) extendByCall(all []*held, sent time.Time, timeout time.Duration) {
	for part := range slices.Chunk(all, 1000) {
		request := &workqueuev1.ExtendLeasesRequest{}
		for _, h := range part {
			request.Extensions = append(request.Extensions, &workqueuev1.Extension{LeaseToken: h.lease.LeaseToken})
		}
		ctx, cancel := context.WithTimeout(s.worker.life, timeout)
		response, err := s.worker.Client.ExtendLeases(ctx, request)
		cancel()
		if err != nil {
			s.worker.Log.Warn("leases were not extended; trying again", "error", err) // else they run out by themselves
			continue
		}
		for i, result := range response.Results {
			part[i].extended(result, sent)
		}
	}
}

func (h *held) extended(result *workqueuev1.ExtendResult, sent time.Time) {
	if FromItem(result.Status) != nil {
		h.lose(ErrLeaseLost)
		return
	}
	h.expiry.Reset(time.Until(sent.Add(result.LeaseDuration.AsDuration())))
	if result.CancelRequested {
		h.stop(ErrCancelled)
	}
}

// finish waits for the outcomes of this stream's leases, says that no more will come, and hears the server out.
func (s *session) finish() {
	settled := make(chan struct{})
	go func() { s.unsettled.Wait(); close(settled) }()
	select {
	case <-s.dead:
		return
	case <-settled:
	}
	s.sending.Lock()
	s.closed = true
	_ = s.stream.CloseSend() // always nil
	s.sending.Unlock()
	late := time.AfterFunc(lastWords, s.breakOff)
	defer late.Stop()
	<-s.dead
}
