package client

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"

	scattergatherv1 "retinue/scattergather/v1"
)

// Pool is a pool of leaves, for those who ask it.
type Pool struct {
	// Client is the root. Required.
	Client scattergatherv1.ScatterGatherServiceClient
	// ID is the pool's name. Required.
	ID string
	// Policy says what is good enough an answer, which then may be partial; nil = only all shards are.
	Policy *scattergatherv1.ScatterPolicy
}

// Question is what to ask whom.
type Question struct {
	// Payload is what each leaf gets.
	Payload []byte
	// Each gives shards inputs of their own instead, by name; they select the shards, if nothing else does.
	Each map[string][]byte
	// RouteKeys selects the shards to which these keys belong. Excludes Shards; both empty = all shards.
	RouteKeys []string
	// Shards selects these. Excludes RouteKeys.
	Shards []string
}

// Answer is what the pool's merge made of the replies. GetPayload, GetJson and GetCollected give it, Failures and Stats how it
// came about.
type Answer struct {
	*scattergatherv1.ScatterResponse
}

// Complete tells whether every selected shard answered, and each of them completely: what to look at before it is trusted.
func (a *Answer) Complete() bool { return a.Coverage.GetComplete() }

// Decode reads an answer that is JSON, as json.Unmarshal does.
func (a *Answer) Decode(into any) error {
	text, err := a.GetJson().MarshalJSON()
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

// Scatter asks the pool. Its errors are those of the call: FromError(err).Missing tells of the shards that are missing. ctx's
// deadline counts, if it is sooner than the pool's; when ctx is done the leaves are cancelled.
func (p *Pool) Scatter(ctx context.Context, question Question) (*Answer, error) {
	response, err := p.Client.Scatter(ctx, p.request(question))
	if err != nil {
		return nil, err
	}
	return &Answer{response}, nil
}

// Events asks the pool and tells of each shard, when it is known what became of it, and at last of the answer. An error, as of
// Scatter, is the last event, too. Who leaves the loop cancels the rest.
func (p *Pool) Events(ctx context.Context, question Question) iter.Seq2[*scattergatherv1.ScatterStreamResponse, error] {
	return func(yield func(*scattergatherv1.ScatterStreamResponse, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := p.Client.ScatterStream(ctx, &scattergatherv1.ScatterStreamRequest{Request: p.request(question)})
		for err == nil {
			var event *scattergatherv1.ScatterStreamResponse
			if event, err = stream.Recv(); err == nil && !yield(event, nil) {
				return
			}
		}
		if !errors.Is(err, io.EOF) {
			yield(nil, err)
		}
	}
}

func (p *Pool) request(question Question) *scattergatherv1.ScatterRequest {
	request := &scattergatherv1.ScatterRequest{
		PoolId: p.ID, RouteKeys: question.RouteKeys, ShardIds: question.Shards, Policy: p.Policy,
		Input: &scattergatherv1.ScatterRequest_Payload{Payload: question.Payload},
	}
	if question.Each != nil {
		request.Input = &scattergatherv1.ScatterRequest_ShardInputs{ShardInputs: shardInputs(question.Each)}
	}
	return request
}

func shardInputs(each map[string][]byte) *scattergatherv1.ShardInputs {
	all := &scattergatherv1.ShardInputs{}
	for shard, payload := range each {
		one := &scattergatherv1.ShardInput{ShardId: shard, Input: &scattergatherv1.ShardInput_Payload{Payload: payload}}
		all.Inputs = append(all.Inputs, one)
	}
	return all
}
