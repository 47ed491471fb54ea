// Command clientgo hands a Lease back and forth between two electors of client-go with its default timings and
// ReleaseOnCancel, and prints how long each hand-over took, from cancelling the leader to the other's OnStartedLeading,
// in milliseconds, one line each.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// settle lets the next candidate look at the Lease once, so that it polls when it is resigned to.
const settle = 3 * time.Second

type candidate struct {
	elected chan time.Time
	cancel  context.CancelFunc
	done    chan struct{}
}

func stand(client kubernetes.Interface, namespace, name string) *candidate {
	ctx, cancel := context.WithCancel(context.Background())
	c := &candidate{make(chan time.Time, 1), cancel, make(chan struct{})}
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Name: "bench", Namespace: namespace},
			Client:     client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: name},
		},
		LeaseDuration:   15 * time.Second,
		RenewDeadline:   10 * time.Second,
		RetryPeriod:     2 * time.Second,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { c.elected <- time.Now() },
			OnStoppedLeading: func() {},
		},
	})
	check(err)
	go func() {
		elector.Run(ctx)
		close(c.done)
	}()
	return c
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	config, err := clientcmd.BuildConfigFromFlags("", os.Args[1])
	check(err)
	client, err := kubernetes.NewForConfig(config)
	check(err)
	count, err := strconv.Atoi(os.Args[3])
	check(err)
	leader := stand(client, os.Args[2], "0")
	<-leader.elected
	for at := range count {
		next := stand(client, os.Args[2], strconv.Itoa(at+1))
		time.Sleep(settle)
		began := time.Now()
		leader.cancel()
		fmt.Println((<-next.elected).Sub(began).Seconds() * 1000)
		<-leader.done
		leader = next
	}
}
