package client

import (
	"context"
	"errors"
	"unicode/utf8"

	workqueuev1 "retinue/workqueue/v1"
)

// outcome is how a lease ends: one of the three.
type outcome struct {
	completion *workqueuev1.Completion
	failure    *workqueuev1.TaskFailure
	release    *workqueuev1.Release
}

func completion(token []byte, result Result) outcome {
	return outcome{completion: &workqueuev1.Completion{LeaseToken: token, Result: result.Payload, FollowUps: result.FollowUps}}
}

func release(token []byte) outcome {
	return outcome{release: &workqueuev1.Release{LeaseToken: token}}
}

func failure(token []byte, err error) outcome {
	said := &Failure{Reason: "ERROR", Message: err.Error()}
	_ = errors.As(err, &said)
	why := &workqueuev1.Failure{Reason: cut(said.Reason, 128), Message: cut(said.Message, 4096)}
	return outcome{failure: &workqueuev1.TaskFailure{LeaseToken: token, Failure: why, Final: said.Final}}
}

// cut keeps the first characters; what is not UTF-8 is replaced, because a message with it could not be sent.
func cut(text string, limit int) string {
	runes := []rune(text)
	if len(runes) <= limit && utf8.ValidString(text) {
		return text
	}
	return string(runes[:min(len(runes), limit)])
}

func (o outcome) isCompletion() bool { return o.completion != nil }

func (o outcome) onStream() *workqueuev1.StreamTasksRequest {
	request := &workqueuev1.StreamTasksRequest{}
	switch {
	case o.completion != nil:
		request.Completions = []*workqueuev1.Completion{o.completion}
	case o.failure != nil:
		request.Failures = []*workqueuev1.TaskFailure{o.failure}
	default:
		request.Releases = []*workqueuev1.Release{o.release}
	}
	return request
}

func (o outcome) byCall(ctx context.Context, client workqueuev1.WorkQueueServiceClient) *Error {
	status, err := o.call(ctx, client)
	if err != nil {
		return FromError(err)
	}
	return FromItem(status)
}

func (o outcome) call(ctx context.Context, client workqueuev1.WorkQueueServiceClient) (*workqueuev1.ItemStatus, error) {
	switch request := o.onStream(); {
	case o.completion != nil:
		response, err := client.CompleteTasks(ctx, &workqueuev1.CompleteTasksRequest{Completions: request.Completions})
		if err != nil {
			return nil, err
		}
		return response.Results[0].Status, nil
	case o.failure != nil:
		response, err := client.FailTasks(ctx, &workqueuev1.FailTasksRequest{Failures: request.Failures})
		if err != nil {
			return nil, err
		}
		return response.Results[0].Status, nil
	default:
		response, err := client.ReleaseTasks(ctx, &workqueuev1.ReleaseTasksRequest{Releases: request.Releases})
		if err != nil {
			return nil, err
		}
		return response.Results[0].Status, nil
	}
}
