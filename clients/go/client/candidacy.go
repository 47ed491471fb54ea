package client

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	leaderelectionv1 "retinue/leaderelection/v1"
)

const (
	contractLease                 = 2 * time.Second // what the contract gives those who ask for no app's lease
	beats                         = 4               // how many heartbeats fit into an app's lease
	shortestLease, longestLease   = 100 * time.Millisecond, 5 * time.Minute
	leastSilence                  = time.Second            // a stream that is silent for longer, and for a whole lease, is given up
	longestLook                   = 250 * time.Millisecond // Go's timers stand still while the machine is suspended
	resignTimeout, goodbyeTimeout = 2 * time.Second, 250 * time.Millisecond
	resignAgain                   = 50 * time.Millisecond
)

var errSilent = errors.New("cannot go on: the server answers no heartbeats")

type campaignStream = grpc.BidiStreamingClient[leaderelectionv1.CampaignRequest, leaderelectionv1.CampaignResponse]

// candidacy is one session: it outlives its streams, and gives one term at most. Heartbeats come from a goroutine of the
// app's process, whatever the work does.
type candidacy struct {
	election *Election
	deadline *deadline
	parent   context.Context // of the work
	life     context.Context // ends the session's goroutines
	end      context.CancelFunc
	done     chan struct{}  // closed when no stream will be opened any more
	fatal    *Error         // why, unless it was ended here. Set before done is closed
	elected  chan *Term     // gets the term
	watching sync.WaitGroup // what looks at the term's deadline
	proof    *os.File       // nil = none

	mu       sync.Mutex
	start    *leaderelectionv1.CampaignStart
	token    *leaderelectionv1.FencingToken // of the term that the session leads
	term     *Term                          // the one that is served
	appLease time.Duration

	answered bool          // on the present stream
	refused  time.Duration // when the name was found taken first; 0 = it was not
}

// run opens a stream, and another one after each that is lost, until life ends or the server refuses for good.
func (c *candidacy) run() {
	defer close(c.done)
	wait := firstWait
	for c.life.Err() == nil {
		c.untilHealthy()
		c.answered = false
		err := c.converse()
		if c.life.Err() != nil {
			return
		}
		if !c.goesOn(err) {
			c.fatal = err
			if term := c.served(); term != nil {
				term.stop("CONNECTION")
			}
			return
		}
		c.election.tell(Event{Kind: Disconnected, Err: err})
		if c.answered {
			wait = firstWait
		}
		pause(c.life, min(wait/2+rand.N(wait/2), c.interval()))
		wait = min(2*wait, longestWait)
	}
}

// untilHealthy waits: `start` would count as the word of a healthy app.
func (c *candidacy) untilHealthy() {
	for c.life.Err() == nil && !c.election.isHealthy() {
		pause(c.life, c.interval())
	}
}

// goesOn tells whether another stream may fare better. A process that was killed is a live candidate until its lease is over:
// its successor of the same name waits for that.
func (c *candidacy) goesOn(err *Error) bool {
	switch {
	case err.Reason == "CANDIDATE_EXISTS":
		if c.refused == 0 {
			c.refused = c.deadline.now()
		}
		return c.deadline.now()-c.refused < 2*c.lease()
	case err.Code == codes.Unavailable, err.RetryAfter > 0:
		return true
	}
	switch err.Code {
	case codes.AlreadyExists, codes.FailedPrecondition, codes.OutOfRange, codes.Aborted:
		return false
	default:
		return !err.permanent()
	}
}

func (c *candidacy) lease() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.appLease
}

func (c *candidacy) interval() time.Duration { return c.lease() / beats }

// margin is how long before the deadline the work is stopped.
func (c *candidacy) margin() time.Duration {
	if c.election.Margin > 0 {
		return c.election.Margin
	}
	return c.lease() / 10
}

func (c *candidacy) sessionID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.start.SessionId
}

// One stream

func (c *candidacy) converse() *Error {
	ctx, breakOff := context.WithCancelCause(c.life)
	defer breakOff(nil)
	stream, err := c.election.Client.Campaign(ctx)
	if err != nil {
		return FromError(err)
	}
	silent := time.AfterFunc(max(c.lease(), leastSilence), func() { breakOff(errSilent) })
	defer silent.Stop()
	var talking sync.WaitGroup
	talking.Add(1)
	go func() { defer talking.Done(); c.talk(ctx, stream) }()
	err = c.listen(stream, silent)
	if context.Cause(ctx) == errSilent {
		err = &Error{Code: codes.Unavailable, Message: errSilent.Error()}
	}
	breakOff(nil)
	talking.Wait()
	if errors.Is(err, io.EOF) {
		return &Error{Code: codes.Canceled, Message: "the server ended the stream"}
	}
	return FromError(err)
}

// talk sends `start`, then heartbeats: each is stamped before it is sent. A broken stream shows in listen.
func (c *candidacy) talk(ctx context.Context, stream campaignStream) {
	c.mu.Lock()
	start := proto.CloneOf(c.start)
	c.mu.Unlock()
	c.deadline.start()
	err := stream.Send(&leaderelectionv1.CampaignRequest{Message: &leaderelectionv1.CampaignRequest_Start{Start: start}})
	for err == nil && ctx.Err() == nil {
		unhealthy := !c.election.isHealthy()
		if term := c.served(); unhealthy && term != nil {
			term.stop("UNHEALTHY")
		}
		beat := &leaderelectionv1.CampaignHeartbeat{Sequence: c.deadline.beat(), Unhealthy: unhealthy}
		err = stream.Send(&leaderelectionv1.CampaignRequest{Message: &leaderelectionv1.CampaignRequest_Heartbeat{Heartbeat: beat}})
		pause(ctx, c.interval())
	}
}

func (c *candidacy) listen(stream campaignStream, silent *time.Timer) error {
	for {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		silent.Reset(max(c.lease(), leastSilence))
		if !c.answered {
			c.answered, c.refused = true, 0
			c.election.tell(Event{Kind: Connected})
		}
		c.hear(response)
	}
}

func (c *candidacy) hear(response *leaderelectionv1.CampaignResponse) {
	switch event := response.Event.(type) {
	case *leaderelectionv1.CampaignResponse_HeartbeatAck:
		c.acknowledged(event.HeartbeatAck)
	case *leaderelectionv1.CampaignResponse_Elected:
		c.led(event.Elected)
	case *leaderelectionv1.CampaignResponse_Standby:
		c.mu.Lock()
		c.start.SessionId = event.Standby.SessionId
		c.mu.Unlock()
		c.election.tell(Event{Kind: Standby, Leader: event.Standby.Leader})
	case *leaderelectionv1.CampaignResponse_AtRisk:
		c.election.tell(Event{Kind: AtRisk, Remaining: event.AtRisk.RemainingDuration.AsDuration()})
	case *leaderelectionv1.CampaignResponse_StepDownRequested:
		c.asked("STEP_DOWN_REQUESTED")
	case *leaderelectionv1.CampaignResponse_Draining:
		c.asked("DRAINING")
	case *leaderelectionv1.CampaignResponse_Lost:
		c.lost(strings.TrimPrefix(event.Lost.Reason.String(), "END_REASON_"))
	}
}

func (c *candidacy) led(leadership *leaderelectionv1.Leadership) {
	c.mu.Lock()
	c.start.SessionId = leadership.SessionId
	another := !proto.Equal(c.token, leadership.Token)
	c.token = leadership.Token
	c.mu.Unlock()
	if another && c.served() != nil {
		c.lost("EXPIRED") // another term is for another campaign
		return
	}
	if another {
		c.deadline.reset()
	}
	c.grant(leadership.Sequence, leadership.ValidDuration.AsDuration())
}

func (c *candidacy) acknowledged(ack *leaderelectionv1.CampaignHeartbeatAck) {
	c.mu.Lock()
	leads := c.token != nil
	c.mu.Unlock()
	if leads && ack.ValidDuration != nil {
		c.grant(ack.Sequence, ack.ValidDuration.AsDuration())
	}
}

func (c *candidacy) grant(sequence int64, valid time.Duration) {
	c.deadline.grant(sequence, valid)
	c.mu.Lock()
	if c.election.AppLease == 0 { // then the server's answer tells: it has taken the guard, a tenth, off
		c.appLease = min(max(valid*10/9, shortestLease), longestLease)
	}
	c.mu.Unlock()
	if c.served() == nil && c.deadline.remaining() > c.margin() { // it may have come late
		c.enter()
	}
}

// The term

func (c *candidacy) enter() {
	ctx, cancel := context.WithCancelCause(c.parent)
	term := &Term{Token: proto.CloneOf(c.token), candidacy: c, ctx: ctx, cancel: cancel}
	c.mu.Lock()
	c.term = term
	c.mu.Unlock()
	c.watching.Add(1)
	go func() { defer c.watching.Done(); c.watch(term) }()
	c.elected <- term
}

// watch stops the work before the deadline; past it the session ends, for nobody serves another term of it.
func (c *candidacy) watch(term *Term) {
	for c.life.Err() == nil {
		left, margin := c.deadline.remaining(), c.margin()
		if left <= margin {
			term.stop("DEADLINE")
		}
		if left == 0 {
			term.over.Store(true)
			c.end()
			return
		}
		due := left
		if term.ctx.Err() == nil {
			due = left - margin
		}
		pause(c.life, min(due, longestLook))
	}
}

func (c *candidacy) served() *Term {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.term
}

func (c *candidacy) asked(reason string) {
	term := c.served()
	if term == nil {
		return
	}
	c.election.tell(Event{Kind: Asked, Reason: reason})
	if !c.election.KeepOnRequest {
		term.stop(reason)
	}
}

func (c *candidacy) lost(reason string) {
	if term := c.served(); term != nil {
		term.over.Store(true)
		term.stop(reason)
		c.end()
	}
}

// After it

// leave ends the session, and with it the leadership if there is any left; the next candidate need not wait. A session that
// does not lead resigns, too: or it might yet be elected, with nobody there.
func (c *candidacy) leave() (released bool) {
	if c.sessionID() != "" {
		released = c.resign()
	}
	c.end()
	<-c.done
	c.watching.Wait()
	if c.proof != nil {
		dropProof(c.proof)
	}
	return released
}

func (c *candidacy) resign() bool {
	timeout := goodbyeTimeout
	if c.leads() {
		timeout = min(resignTimeout, c.deadline.remaining())
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.parent), timeout)
	defer cancel()
	for {
		response, err := c.election.Client.Resign(ctx, &leaderelectionv1.ResignRequest{SessionId: c.sessionID()})
		again := err == nil || FromError(err).Code == codes.Unavailable // a server that has just started knows no session yet
		switch {
		case response.GetReleased():
			return true
		case c.leads() && again && ctx.Err() == nil:
			pause(ctx, resignAgain)
		case err != nil:
			c.election.Log.Warn("not resigned: the election passes on when its time is over", "election", c.election.ID, "error", err)
			return false
		default:
			return false
		}
	}
}

func (c *candidacy) leads() bool {
	term := c.served()
	return term != nil && term.IsLeader()
}
