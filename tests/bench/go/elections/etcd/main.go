// Command etcd hands an election of etcd's own Election API back and forth between two sessions, and prints how long each
// hand-over took, from Resign to the other's Campaign returning, in milliseconds, one line each.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// settle lets the next candidate wait before it is resigned to: etcd takes up to 100 ms until a new watch of the past hears
// news at once.
const settle = 120 * time.Millisecond

type candidate struct {
	election *concurrency.Election
	name     string
	elected  chan time.Time
}

func newCandidate(endpoint, name string) *candidate {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 10 * time.Second})
	check(err)
	session, err := concurrency.NewSession(client, concurrency.WithTTL(15))
	check(err)
	election := concurrency.NewElection(session, "/bench/election")
	return &candidate{election, name, make(chan time.Time, 1)}
}

func (c *candidate) campaign() {
	check(c.election.Campaign(context.Background(), c.name))
	c.elected <- time.Now()
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	count, err := strconv.Atoi(os.Args[2])
	check(err)
	leader, other := newCandidate(os.Args[1], "a"), newCandidate(os.Args[1], "b")
	leader.campaign()
	<-leader.elected
	for range count {
		go other.campaign()
		time.Sleep(settle)
		began := time.Now()
		check(leader.election.Resign(context.Background()))
		fmt.Println((<-other.elected).Sub(began).Seconds() * 1000)
		leader, other = other, leader
	}
}
