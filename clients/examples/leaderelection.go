// An election from end to end; prints clients/transcripts/leaderelection.txt. Give an election of your own to run it twice.
// In clients/go, with RETINUE_CONTROL_ADDRESS set to the server's control socket: go run ../examples/leaderelection.go
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"retinue/client"
	pb "retinue/leaderelection/v1"
)

const appLease = 2 * time.Second

var ctx = context.Background()

func main() {
	name := "transcript"
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	channel, control := must(client.Dial("leaderelection")), must(client.Dial("control"))
	defer channel.Close()
	defer control.Close()
	elections, operator := pb.NewLeaderElectionServiceClient(channel), pb.NewLeaderElectionServiceClient(control)
	fmt.Println("before the first term:", leader(elections, name))
	refuse(elections, name)
	first := must(candidate(elections, name, "first").Campaign(ctx))
	fmt.Printf("first is elected: %t, its token is above 0: %t\n", first.IsLeader(), first.Token.Value > 0)
	second := standBy(elections, name)
	keep(first)
	proclaim(elections, name, first)
	after := handOver(elections, name, first, second)
	stepDown(elections, operator, name, after)
	remember(elections, name)
}

func candidate(elections pb.LeaderElectionServiceClient, name, id string) *client.Election {
	return &client.Election{Client: elections, ID: name, CandidateID: id, AppLease: appLease}
}

func refuse(elections pb.LeaderElectionServiceClient, name string) {
	nonsense := &pb.TryAcquireRequest{
		ElectionId: "no spaces, please", CandidateId: "", AppLeaseDuration: durationpb.New(time.Hour),
	}
	_, err := elections.TryAcquire(ctx, nonsense)
	fmt.Println("stood with nonsense:", told(err))
	fields := client.FromError(err).Fields
	slices.SortFunc(fields, func(a, b client.Field) int { return strings.Compare(a.Path, b.Path) })
	for _, field := range fields {
		fmt.Println(" ", field.Path)
	}
	unknown := &pb.FencingToken{Domain: "nowhere", Value: 1}
	_, err = elections.VerifyToken(ctx, &pb.VerifyTokenRequest{ElectionId: name, Token: unknown})
	fmt.Println("verified a token before the first term:", told(err))
}

// standBy has another candidate wait; the channel gives the term that it will have.
func standBy(elections pb.LeaderElectionServiceClient, name string) <-chan *client.Term {
	waits, elected := make(chan *pb.Leader, 1), make(chan *client.Term, 1)
	election := candidate(elections, name, "second")
	election.Notify = func(event client.Event) {
		if event.Kind == client.Standby {
			waits <- event.Leader
		}
	}
	go func() { elected <- must(election.Campaign(ctx)) }()
	fmt.Printf("second stands by: %s leads\n", (<-waits).CandidateId)
	response := must(elections.TryAcquire(ctx, &pb.TryAcquireRequest{ElectionId: name, CandidateId: "third"}))
	fmt.Printf("third tried: acquired %t, %s leads\n", response.Acquired, response.Leader.CandidateId)
	return elected
}

// keep waits for longer than the app's lease: heartbeats go on by themselves.
func keep(term *client.Term) {
	time.Sleep(3 * appLease)
	fmt.Printf("three leases later first still leads: %t, its work goes on: %t\n", term.IsLeader(), term.Context().Err() == nil)
}

func proclaim(elections pb.LeaderElectionServiceClient, name string, term *client.Term) {
	observing, stop := context.WithCancel(ctx)
	defer stop()
	seen := must(elections.Observe(observing, &pb.ObserveRequest{ElectionId: name}))
	fmt.Println("an observer sees:", shown(must(seen.Recv()).Leader))
	check(term.Proclaim(ctx, "10.0.0.1:8080"))
	fmt.Println("first proclaims, the observer sees:", shown(must(seen.Recv()).Leader))
	verified := must(elections.VerifyToken(ctx, &pb.VerifyTokenRequest{ElectionId: name, Token: term.Token}))
	fmt.Println("first's token is verified:", shown(verified.Leader))
}

func handOver(elections pb.LeaderElectionServiceClient, name string, first *client.Term, elected <-chan *client.Term) *client.Term {
	fmt.Printf("first resigns: released %t, it leads: %t\n", first.Resign(), first.IsLeader())
	second := <-elected
	fmt.Printf("second is elected: a higher token: %t, the same domain: %t\n",
		second.Token.Value > first.Token.Value, second.Token.Domain == first.Token.Domain)
	_, err := elections.VerifyToken(ctx, &pb.VerifyTokenRequest{ElectionId: name, Token: first.Token})
	fmt.Println("first's token is refused:", told(err))
	fmt.Println("first proclaims under it:", told(first.Proclaim(ctx, "too late")))
	return second
}

func stepDown(elections, operator pb.LeaderElectionServiceClient, name string, second *client.Term) {
	request := &pb.RequestStepDownRequest{ElectionId: name, Token: second.Token}
	_, err := elections.RequestStepDown(ctx, request)
	fmt.Println("an app asks second to step down:", told(err))
	answer := must(operator.RequestStepDown(ctx, request))
	fmt.Printf("an operator asks second to step down: %t\n", answer.Requested)
	<-second.Context().Done()
	var lost *client.TermLost
	errors.As(context.Cause(second.Context()), &lost)
	fmt.Printf("second must stop its work: %s, it still leads: %t\n", lost.Reason, second.IsLeader())
	fmt.Printf("second resigns: released %t\n", second.Resign())
}

func remember(elections pb.LeaderElectionServiceClient, name string) {
	fmt.Println("after the last term:", leader(elections, name))
	for _, term := range must(elections.ListTerms(ctx, &pb.ListTermsRequest{ElectionId: name})).Terms {
		fmt.Printf("a term of %s ended: %s\n", term.CandidateId, strings.TrimPrefix(term.EndReason.String(), "END_REASON_"))
	}
}

func leader(elections pb.LeaderElectionServiceClient, name string) string {
	return shown(must(elections.GetLeader(ctx, &pb.GetLeaderRequest{ElectionId: name})).Leader)
}

func shown(leader *pb.Leader) string {
	switch {
	case leader.CandidateId == "":
		return "nobody leads"
	case leader.Value == "":
		return leader.CandidateId + " leads"
	default:
		return leader.CandidateId + " leads at " + leader.Value
	}
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
