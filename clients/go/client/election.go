package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	leaderelectionv1 "retinue/leaderelection/v1"
)

// reentry is how long one that was asked to give up leadership lets others come first.
const reentry = 2 * time.Second

// Election is one election, for those who want to lead it: work that runs while it leads and has ended before anybody else
// can lead.
//
// The one guarantee that covers an effect which arrives late is the token: whatever is protected must refuse a lower one than
// the highest it has seen. Deadlines are those of the machine's boot clock, which only Linux has.
type Election struct {
	// Client is the server. Required.
	Client leaderelectionv1.LeaderElectionServiceClient
	// ID is the election's name. Required.
	ID string
	// CandidateID must be unique in the election; by default it is made of host name, process id and something random.
	CandidateID string
	// Value is what is proclaimed, such as an address, up to 4,096 characters.
	Value string
	// Lease is how soon others take over when the server is gone, 1 s to 10 min, by default what the server says (15 s).
	Lease time.Duration
	// AppLease is how soon others take over when this process is gone, 100 ms to half of Lease, by default what the server
	// says (2 s). A process that stands still for longer loses its leadership.
	AppLease time.Duration
	// ReleaseDelay is what others wait after a term that did not end by resignation, up to 10 min.
	ReleaseDelay time.Duration
	// Margin is how long before the deadline the work is stopped, by default a tenth of AppLease.
	Margin time.Duration
	// KeepOnRequest leaves it to Notify to stop the work when a step-down is asked for or the server stops.
	KeepOnRequest bool
	// ProofDir is a directory that the server sees, too, as its proof directory: a locked file there proves our death, so
	// that others need not wait for AppLease. By default RETINUE_LEADERELECTION_PROOF_DIR; empty = no proof.
	ProofDir string
	// Healthy is asked with each heartbeat; false gives leadership up, and does not stand.
	Healthy func() bool
	// Notify hears what happens. It must not block: the deadline is kept meanwhile, but nothing more is heard.
	Notify func(Event)
	// Log gets resignations that fail; by default slog.Default().
	Log *slog.Logger

	once sync.Once
}

// EventKind is what happened.
type EventKind int

const (
	// Connected: the server answered, for the first time or again.
	Connected EventKind = iota
	// Disconnected: the stream broke for Err; another one is tried.
	Disconnected
	// Standby: Leader leads, as far as the server knows.
	Standby
	// AtRisk: the server can't renew; the leadership can last for Remaining if that stays so.
	AtRisk
	// Asked: the work should end, for Reason: STEP_DOWN_REQUESTED or DRAINING.
	Asked
)

// Event is what happened to a candidate.
type Event struct {
	Kind      EventKind
	Leader    *leaderelectionv1.Leader
	Reason    string
	Remaining time.Duration
	Err       *Error
}

// TermLost is the cause of a term's context when the leadership is over or about to be: publish nothing.
type TermLost struct {
	ElectionID string
	// Reason is DEADLINE (nothing renewed it in time), STEP_DOWN_REQUESTED, DRAINING (the server stops), UNHEALTHY,
	// CONNECTION (the server refused to go on), or the server's word: EXPIRED, ENGINE_LOST, APP_SILENT ...
	Reason string
}

func (l *TermLost) Error() string {
	return fmt.Sprintf("cannot go on: the leadership of %s is lost [%s]", l.ElectionID, l.Reason)
}

// Term is one leadership. Its methods may be called from any goroutine.
type Term struct {
	// Token is what the protected resource compares; the same for the whole term.
	Token *leaderelectionv1.FencingToken

	candidacy *candidacy
	ctx       context.Context
	cancel    context.CancelCauseFunc
	over      atomic.Bool // whatever the deadline says
	ended     atomic.Bool // the work has: what is heard from now on is the echo of our resignation
	resigning sync.Once
	released  bool
}

// Context is for the work: it ends before the leadership does. Its cause is then a *TermLost.
func (t *Term) Context() context.Context { return t.ctx }

// IsLeader tells whether the leadership is valid at this instant, without asking anybody.
func (t *Term) IsLeader() bool { return t.Remaining() > 0 }

// Remaining is how long the leadership lasts if nothing is renewed; 0 = it is over.
func (t *Term) Remaining() time.Duration {
	if t.over.Load() {
		return 0
	}
	return t.candidacy.deadline.remaining()
}

// Proof is the locked file that proves our death, for exec.Cmd.ExtraFiles of processes that work for the term; nil = none.
func (t *Term) Proof() *os.File { return t.candidacy.proof }

// Proclaim publishes a value for those who look for the leader, up to 4,096 characters. Its errors are those of the call.
func (t *Term) Proclaim(ctx context.Context, value string) error {
	c := t.candidacy
	request := &leaderelectionv1.ProclaimRequest{SessionId: c.sessionID(), Token: t.Token, Value: value}
	if _, err := c.election.Client.Proclaim(ctx, request); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.start.Value = value
	return nil
}

// Resign ends the term when its work has stopped, and not before; the next candidate takes over at once. It must be called
// however the work ended; it takes 2 s at most, and repeating it is safe. It tells whether a leadership was given on.
func (t *Term) Resign() (released bool) {
	t.resigning.Do(func() {
		t.ended.Store(true)
		t.released = t.candidacy.leave()
		t.over.Store(true)
		t.cancel(nil)
	})
	return t.released
}

func (t *Term) stop(reason string) {
	if !t.ended.Load() {
		t.cancel(&TermLost{ElectionID: t.candidacy.election.ID, Reason: reason}) // the first one counts
	}
}

// loss is why the work had to stop; nil = it had not.
func (t *Term) loss() *TermLost {
	var lost *TermLost
	errors.As(context.Cause(t.ctx), &lost)
	return lost
}

// Campaign stands for the election and returns when it is won; Resign must then be called. When ctx is done it stops
// standing, or the term's context ends; the leadership goes on until Resign. It returns ctx's error, or what the server will
// always refuse; a server that can't be reached is waited for.
func (e *Election) Campaign(ctx context.Context) (*Term, error) {
	e.once.Do(e.setDefaults)
	c, err := e.newCandidacy(ctx)
	if err != nil {
		return nil, err
	}
	go c.run()
	select {
	case term := <-c.elected:
		return term, nil
	case <-c.done:
		err = c.fatal
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	c.leave()
	return nil, err
}

// Lead campaigns again and again, and does the work each time it leads, until the work ends by itself: it returns what the
// work does, or what Campaign does. The work's context ends before its leadership; then it must return an error soon, such as
// the context's cause. Until it has returned, nobody else leads for this process.
func (e *Election) Lead(ctx context.Context, work func(context.Context, *Term) error) error {
	for {
		term, err := e.Campaign(ctx)
		if err != nil {
			return err
		}
		err = e.serve(term, work)
		lost := term.loss()
		if lost == nil || !isOurs(err) {
			return err
		}
		if lost.Reason == "STEP_DOWN_REQUESTED" || lost.Reason == "UNHEALTHY" {
			pause(ctx, reentry)
		}
	}
}

// serve resigns even if the work panics.
func (e *Election) serve(term *Term, work func(context.Context, *Term) error) error {
	defer term.Resign()
	return work(term.Context(), term)
}

func isOurs(err error) bool {
	var lost *TermLost
	return errors.Is(err, context.Canceled) || errors.As(err, &lost)
}

func (e *Election) newCandidacy(parent context.Context) (*candidacy, error) {
	life, end := context.WithCancel(context.WithoutCancel(parent))
	c := &candidacy{
		election: e, deadline: newDeadline(bootTime), parent: parent, life: life, end: end,
		done: make(chan struct{}), elected: make(chan *Term, 1), appLease: contractLease,
		start: &leaderelectionv1.CampaignStart{
			ElectionId: e.ID, CandidateId: e.CandidateID, Value: e.Value,
			LeaseDuration: asked(e.Lease), AppLeaseDuration: asked(e.AppLease), ReleaseDelayDuration: asked(e.ReleaseDelay),
		},
	}
	if e.AppLease > 0 {
		c.appLease = e.AppLease
	}
	if e.ProofDir == "" {
		return c, nil
	}
	proof, err := newProof(e.ProofDir)
	if err != nil {
		end()
		return nil, err
	}
	c.proof, c.start.ProofFile = proof, filepath.Base(proof.Name())
	return c, nil
}

func (e *Election) setDefaults() {
	if e.CandidateID == "" {
		e.CandidateID = newCandidateID()
	}
	if e.ProofDir == "" {
		e.ProofDir = os.Getenv("RETINUE_LEADERELECTION_PROOF_DIR")
	}
	if e.Log == nil {
		e.Log = slog.Default()
	}
}

// newCandidateID is unique per process, also when a restarted pod has its old name and pid.
func newCandidateID() string {
	host, _ := os.Hostname() // a name for people: without one the rest must do
	allowed := func(r rune) rune {
		if strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-", r) {
			return r
		}
		return '-'
	}
	host = strings.TrimLeft(strings.Map(allowed, fmt.Sprintf("%.64s", host)), ".-")
	if host == "" {
		host = "host"
	}
	return fmt.Sprintf("%s-%d-%.8s", host, os.Getpid(), rand.Text())
}

func (e *Election) isHealthy() bool { return e.Healthy == nil || e.Healthy() }

func (e *Election) tell(event Event) {
	if e.Notify != nil {
		e.Notify(event)
	}
}

func asked(duration time.Duration) *durationpb.Duration {
	if duration == 0 {
		return nil
	}
	return durationpb.New(duration)
}
