package client

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"

	"google.golang.org/grpc"

	scattergatherv1 "retinue/scattergather/v1"
)

// Pool is a pool of leaves, for those who ask it.
type Pool struct {
	// Client is the root. Required.
	Client scattergatherv1.ScatterGatherServiceClient
	// ID is the pool's name. Required.
	ID string
}

// Question is what to ask whom. Payload, JSON and Inputs exclude each other.
type Question struct {
	// Payload is what each leaf gets.
	Payload []byte
	// JSON is a value whose text, as json.Marshal writes it, each leaf gets instead.
	JSON any
	// Inputs gives shards inputs of their own instead, by name; they select the shards, if nothing else does.
	Inputs map[string][]byte
	// Shards selects shards by name. Excludes Keys; both empty = all shards.
	Shards []string
	// Keys selects the shards to which these keys belong.
	Keys []string
	// Policy says what is good enough an answer, which then may be partial; nil = only all shards are.
	Policy *scattergatherv1.ScatterPolicy
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
	request, err := p.request(question)
	if err != nil {
		return nil, err
	}
	response, err := p.Client.Scatter(ctx, request)
	if err != nil {
		return nil, err
	}
	return &Answer{response}, nil
}

// Stream asks the pool and tells of each shard, when it is known what became of it, and at last of the answer. An error, as of
// Scatter, is the last that comes, too. Who leaves the loop cancels the rest.
func (p *Pool) Stream(ctx context.Context, question Question) iter.Seq2[*scattergatherv1.ScatterStreamResponse, error] {
	return func(yield func(*scattergatherv1.ScatterStreamResponse, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := p.stream(ctx, question)
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

type events = grpc.ServerStreamingClient[scattergatherv1.ScatterStreamResponse]

func (p *Pool) stream(ctx context.Context, question Question) (events, error) {
	request, err := p.request(question)
	if err != nil {
		return nil, err
	}
	return p.Client.ScatterStream(ctx, &scattergatherv1.ScatterStreamRequest{Request: request})
}

func (p *Pool) request(question Question) (*scattergatherv1.ScatterRequest, error) {
	request := &scattergatherv1.ScatterRequest{
		PoolId: p.ID, RouteKeys: question.Keys, ShardIds: question.Shards, Policy: question.Policy,
	}
	switch {
	case question.Inputs != nil:
		request.Input = &scattergatherv1.ScatterRequest_ShardInputs{ShardInputs: shardInputs(question.Inputs)}
	case question.JSON != nil:
		text, err := json.Marshal(question.JSON)
		request.Input = &scattergatherv1.ScatterRequest_Payload{Payload: text}
		return request, err
	default:
		request.Input = &scattergatherv1.ScatterRequest_Payload{Payload: question.Payload}
	}
	return request, nil
}

func shardInputs(inputs map[string][]byte) *scattergatherv1.ShardInputs {
	all := &scattergatherv1.ShardInputs{}
	for shard, payload := range inputs {
		one := &scattergatherv1.ShardInput{ShardId: shard, Input: &scattergatherv1.ShardInput_Payload{Payload: payload}}
		all.Inputs = append(all.Inputs, one)
	}
	return all
}
