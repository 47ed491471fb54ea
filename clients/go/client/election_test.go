package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"retinue/client"
	pb "retinue/leaderelection/v1"
)

const patience = 60 * time.Second

// poll is one election, and connections that a test can cut or freeze.
type poll struct {
	*testing.T
	name      string
	elections pb.LeaderElectionServiceClient // the test's own
	operator  pb.LeaderElectionServiceClient
}

func newPoll(t *testing.T) *poll {
	if os.Getenv("RETINUE_ADDRESS") == "" || os.Getenv("RETINUE_CONTROL_ADDRESS") == "" {
		t.Fatal("cannot test: set RETINUE_ADDRESS and RETINUE_CONTROL_ADDRESS to those of a running server")
	}
	p := &poll{T: t, name: fmt.Sprintf("go-%s-%d", t.Name(), time.Now().UnixNano())}
	p.elections = p.dial("leaderelection")
	p.operator = p.dial("control")
	return p
}

func (p *poll) dial(pattern string, options ...grpc.DialOption) pb.LeaderElectionServiceClient {
	options = append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))
	channel, err := client.Dial(pattern, options...)
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { channel.Close() })
	return pb.NewLeaderElectionServiceClient(channel)
}

// candidate has a lease that is far longer than the app's: who waits for the former is seen to.
func (p *poll) candidate(id string, appLease time.Duration) *client.Election {
	return &client.Election{Client: p.elections, ID: p.name, CandidateID: id, Lease: time.Minute, AppLease: appLease}
}

func (p *poll) elect(election *client.Election) *client.Term {
	p.Helper()
	ctx, cancel := context.WithCancel(p.Context())
	late := time.AfterFunc(patience, cancel)
	defer late.Stop()
	term, err := election.Campaign(ctx)
	if err != nil {
		p.Fatal(err)
	}
	p.Cleanup(func() { term.Resign(); cancel() })
	return term
}

// wait has a candidate stand by; the channel gives its term.
func (p *poll) wait(election *client.Election) <-chan *client.Term {
	elected, waits := make(chan *client.Term, 1), make(chan bool, 100)
	election.Notify = func(event client.Event) {
		if event.Kind == client.Standby {
			waits <- true
		}
	}
	go func() {
		if term, err := election.Campaign(p.Context()); err == nil {
			elected <- term
		}
	}()
	within(p, waits)
	return elected
}

func within[V any](t testing.TB, events <-chan V) (event V) {
	t.Helper()
	select {
	case event = <-events:
	case <-time.After(patience):
		t.Fatal("it did not happen")
	}
	return event
}

func (p *poll) ended(term *client.Term) *client.TermLost {
	p.Helper()
	within(p, term.Context().Done())
	var lost *client.TermLost
	if !errors.As(context.Cause(term.Context()), &lost) {
		p.Fatalf("its work ended with %v", context.Cause(term.Context()))
	}
	return lost
}

// reasons tell why the terms ended, the latest first.
func (p *poll) reasons() (found []pb.EndReason) {
	response, err := p.elections.ListTerms(p.Context(), &pb.ListTermsRequest{ElectionId: p.name})
	if err != nil {
		p.Fatal(err)
	}
	for _, term := range response.Terms {
		found = append(found, term.EndReason)
	}
	return found
}

func (p *poll) expect(what string, got, want any) {
	p.Helper()
	expect(p, what, got, want)
}

func expect(t testing.TB, what string, got, want any) {
	t.Helper()
	if got != want {
		t.Errorf("%v is %v, not %v", what, got, want)
	}
}

// frozen connections take what is written and give nothing back, as a network does that loses everything.
type frozen struct {
	since chan struct{} // closed when it begins
	once  sync.Once
}

type icyConn struct {
	net.Conn
	*frozen
	closed chan struct{}
	once   sync.Once
}

func (f *frozen) dial(ctx context.Context, address string) (net.Conn, error) {
	connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &icyConn{Conn: connection, frozen: f, closed: make(chan struct{})}, nil
}

func (f *frozen) begin() { f.once.Do(func() { close(f.since) }) }

func (c *icyConn) Read(into []byte) (int, error) {
	count, err := c.Conn.Read(into)
	select {
	case <-c.since:
		<-c.closed
		return 0, net.ErrClosed
	default:
		return count, err
	}
}

func (c *icyConn) Write(data []byte) (int, error) {
	select {
	case <-c.since:
		return len(data), nil
	default:
		return c.Conn.Write(data)
	}
}

func (c *icyConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

func TestHeartbeatsCarryATermOverManyLeases(t *testing.T) {
	p := newPoll(t)
	term := p.elect(p.candidate("first", 2*time.Second))
	time.Sleep(5 * time.Second)
	p.expect("its leadership", term.IsLeader(), true)
	p.expect("its work's end", term.Context().Err(), nil)
	p.expect("that it has a tenth less than its lease", term.Remaining() <= 1800*time.Millisecond, true)
}

func TestTheNextLeadsWhenTheWorkHasEndedUnderAHigherToken(t *testing.T) {
	p := newPoll(t)
	first := p.elect(p.candidate("first", 30*time.Second)) // longer than anybody waits here
	elected := p.wait(p.candidate("second", 30*time.Second))
	p.expect("what it gave on", first.Resign(), true)
	p.expect("its leadership", first.IsLeader(), false)
	p.expect("its cause", context.Cause(first.Context()), context.Canceled) // not a TermLost
	second := within(p, elected)
	p.expect("that the token is higher", second.Token.Value > first.Token.Value, true)
	p.expect("the domain", second.Token.Domain, first.Token.Domain)
	second.Resign()
	p.expect("the end", p.reasons()[0], pb.EndReason_END_REASON_RESIGNED)
}

func TestALeaderWhoseConnectionIsCutGoesOnUnderItsToken(t *testing.T) {
	p := newPoll(t)
	links := &links{}
	election := p.candidate("first", 6*time.Second)
	election.Client = p.dial("leaderelection", grpc.WithContextDialer(links.dial))
	connected := make(chan bool, 100)
	election.Notify = func(event client.Event) {
		if event.Kind == client.Connected {
			connected <- true
		}
	}
	term := p.elect(election)
	within(p, connected)
	for range 3 {
		links.cut()
		within(p, connected)
	}
	time.Sleep(7 * time.Second) // what was granted before is over
	p.expect("its leadership", term.IsLeader(), true)
	p.expect("its work's end", term.Context().Err(), nil)
	request := &pb.VerifyTokenRequest{ElectionId: p.name, Token: term.Token}
	if _, err := p.elections.VerifyToken(t.Context(), request); err != nil {
		t.Error(err)
	}
}

func TestWorkThatNothingRenewsIsStoppedBeforeAnyoneElseLeads(t *testing.T) {
	p := newPoll(t)
	ice := &frozen{since: make(chan struct{})}
	election := p.candidate("first", 6*time.Second)
	election.Client, election.Margin = p.dial("leaderelection", grpc.WithContextDialer(ice.dial)), 3*time.Second
	term := p.elect(election)
	elected := p.wait(p.candidate("second", 30*time.Second))
	ice.begin()
	p.expect("why it was stopped", p.ended(term).Reason, "DEADLINE")
	p.expect("its leadership then", term.IsLeader(), true)
	second := within(p, elected)
	p.expect("its leadership when the next one leads", term.IsLeader(), false)
	second.Resign()
	p.expect("the end", p.reasons()[1], pb.EndReason_END_REASON_APP_SILENT)
}

func TestOneThatIsAskedToStepDownLetsOthersComeFirstAndLeadsAgain(t *testing.T) {
	p := newPoll(t)
	ctx, stop := context.WithCancel(t.Context())
	led, over := make(chan *client.Term, 10), make(chan error, 1)
	go func() {
		over <- p.candidate("first", 30*time.Second).Lead(ctx, func(ctx context.Context, term *client.Term) error {
			led <- term
			<-ctx.Done()
			return context.Cause(ctx)
		})
	}()
	first := within(p, led)
	elected := p.wait(p.candidate("second", 30*time.Second))
	request := &pb.RequestStepDownRequest{ElectionId: p.name, Token: first.Token}
	if _, err := p.operator.RequestStepDown(ctx, request); err != nil {
		t.Fatal(err)
	}
	p.expect("why it was stopped", p.ended(first).Reason, "STEP_DOWN_REQUESTED")
	second := within(p, elected)
	p.expect("the end", p.reasons()[1], pb.EndReason_END_REASON_STEPPED_DOWN)
	second.Resign()
	p.expect("that it leads under a higher token", within(p, led).Token.Value > second.Token.Value, true)
	stop()
	p.expect("what Lead returns", within(p, over), context.Canceled)
}

func TestAnAppThatIsNotWellGivesLeadershipUp(t *testing.T) {
	p := newPoll(t)
	var sick atomic.Bool
	election := p.candidate("first", 30*time.Second)
	election.Healthy = func() bool { return !sick.Load() }
	term := p.elect(election)
	elected := p.wait(p.candidate("second", 30*time.Second))
	sick.Store(true)
	p.expect("why it was stopped", p.ended(term).Reason, "UNHEALTHY")
	within(p, elected).Resign()
	p.expect("the end", p.reasons()[1], pb.EndReason_END_REASON_UNHEALTHY)
}

func TestALockedFileProvesADeathThatNobodyWaitsFor(t *testing.T) {
	p := newPoll(t)
	can, err := p.elections.GetCapabilities(t.Context(), &pb.GetCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	links := &links{}
	election := p.candidate("first", 30*time.Second) // longer than anybody waits here
	election.Client, election.ProofDir = p.dial("leaderelection", grpc.WithContextDialer(links.dial)), can.ProofDirectory
	term := p.elect(election)
	elected := p.wait(p.candidate("second", 30*time.Second))
	links.die()
	term.Proof().Close()
	within(p, elected).Resign()
	p.expect("the end", p.reasons()[1], pb.EndReason_END_REASON_APP_DEAD)
	term.Resign()
	_, err = os.Stat(term.Proof().Name())
	p.expect("whether the file is gone", errors.Is(err, os.ErrNotExist), true)
}

func TestACandidateThatGivesUpIsNeverElected(t *testing.T) {
	p := newPoll(t)
	first := p.elect(p.candidate("first", 30*time.Second))
	ctx, giveUp := context.WithCancel(t.Context())
	impatient := p.candidate("impatient", 30*time.Second)
	impatient.Notify = func(event client.Event) {
		if event.Kind == client.Standby {
			giveUp()
		}
	}
	_, err := impatient.Campaign(ctx)
	p.expect("what Campaign returns", err, context.Canceled)
	first.Resign()
	last := p.elect(p.candidate("last", 30*time.Second))
	p.expect("the token", last.Token.Value, first.Token.Value+1)
}

func TestWorkWhoseCallerStopsIsStoppedAndLeadsUntilItResigns(t *testing.T) {
	p := newPoll(t)
	ctx, stop := context.WithCancel(t.Context())
	term, err := p.candidate("first", 2*time.Second).Campaign(ctx)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	p.expect("its work's end", context.Cause(term.Context()), context.Canceled)
	time.Sleep(4 * time.Second) // two leases, while the work comes to its end
	p.expect("its leadership", term.IsLeader(), true)
	p.expect("what it gave on", term.Resign(), true)
}

func TestLeadReturnsWhatItsWorkDoesAndGivesTheElectionOn(t *testing.T) {
	p := newPoll(t)
	broken := errors.New("broken")
	err := p.candidate("first", 30*time.Second).Lead(t.Context(), func(context.Context, *client.Term) error { return broken })
	p.expect("its error", err, broken)
	p.expect("the end", p.reasons()[0], pb.EndReason_END_REASON_RESIGNED)
}

func TestACandidateThatCanNeverStandSaysSo(t *testing.T) {
	p := newPoll(t)
	p.elect(p.candidate("first", 30*time.Second))
	_, err := p.candidate("first", 300*time.Millisecond).Campaign(t.Context())
	p.expect("the reason for a name that is taken", client.FromError(err).Reason, "CANDIDATE_EXISTS")
	p.name = "no spaces, please"
	_, err = p.candidate("second", time.Hour).Campaign(t.Context())
	refusal := client.FromError(err)
	p.expect("the reason for nonsense", refusal.Reason, "INVALID_FIELD")
	p.expect("its violations", len(refusal.Fields), 2)
}
