// A queue from end to end; prints clients/transcripts/workqueue.txt. Give a queue of your own to run it twice.
// In clients/go: go run ../examples/workqueue.go
package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"retinue/client"
	pb "retinue/workqueue/v1"
)

const workerID = "example-go"

var ctx = context.Background()

func main() {
	queue := "transcript"
	if len(os.Args) > 1 {
		queue = os.Args[1]
	}
	channel := must(client.Dial("workqueue"))
	defer channel.Close()
	tasks, admin := pb.NewWorkQueueServiceClient(channel), pb.NewWorkQueueAdminServiceClient(channel)
	connect(admin)
	enqueue(tasks, queue)
	refuse(tasks, queue)
	cancel(tasks, queue)
	leases := lease(tasks, queue, 3)
	invoice, thumbnail, report := leases[0], leases[1], leases[2]
	receiptID := complete(tasks, queue, invoice)
	releaseAndFail(tasks, queue, thumbnail)
	fmt.Println("completed report:", completed(tasks, &pb.Completion{LeaseToken: report.LeaseToken}))
	work(tasks, queue)
	count(tasks, admin, queue, receiptID, invoice.TaskId)
}

func connect(admin pb.WorkQueueAdminServiceClient) {
	limits := must(admin.GetCapabilities(ctx, &pb.GetCapabilitiesRequest{}))
	fmt.Printf("connected: up to %d items a batch, %d bytes a payload\n", limits.MaxBatchItems, limits.MaxPayloadBytes)
}

func enqueue(tasks pb.WorkQueueServiceClient, queue string) {
	report := &pb.TaskSpec{QueueId: queue, TaskType: "report", Input: client.Text("October"), IdempotencyKey: "report-10"}
	image := client.Bytes([]byte("\x89PNG"))
	thumbnail := &pb.TaskSpec{QueueId: queue, TaskType: "thumbnail", Input: image, Priority: 5}
	number := must(client.JSON(map[string]any{"number": 7}))
	invoice := &pb.TaskSpec{QueueId: queue, TaskType: "invoice", Input: number, Priority: 10}
	first := add(tasks, report, thumbnail, invoice)
	old := existing(first)
	fmt.Printf("enqueued: %d new, %d existing\n", len(first)-old, old)

	again := add(tasks, report)
	same := again[0].TaskId == first[0].TaskId
	fmt.Printf("enqueued again: %d existing, the same task: %t\n", existing(again), same)

	report.Input = client.Text("November")
	fmt.Println("enqueued with another input:", told(add(tasks, report)[0].Status))
}

func refuse(tasks pb.WorkQueueServiceClient, queue string) {
	nonsense := []*pb.TaskSpec{{QueueId: queue, Priority: 9999}, {QueueId: "no spaces, please"}}
	_, err := tasks.EnqueueTasks(ctx, &pb.EnqueueTasksRequest{Tasks: nonsense})
	refusal := client.FromError(err)
	fmt.Println("enqueued nonsense:", refusal.CodeName(), refusal.Reason)
	slices.SortFunc(refusal.Fields, func(a, b client.Field) int { return strings.Compare(a.Path, b.Path) })
	for _, field := range refusal.Fields {
		fmt.Println(" ", field.Path)
	}
	_, err = tasks.GetTask(ctx, &pb.GetTaskRequest{TaskId: "nobody-knows"})
	refusal = client.FromError(err)
	fmt.Println("asked for a task that nobody knows:", refusal.CodeName(), refusal.Reason)
}

func cancel(tasks pb.WorkQueueServiceClient, queue string) {
	start := &pb.TaskSpec_DelayDuration{DelayDuration: durationpb.New(24 * time.Hour)}
	id := add(tasks, &pb.TaskSpec{QueueId: queue, Start: start})[0].TaskId
	fmt.Println("enqueued for tomorrow:", state(get(tasks, id).State))
	must(tasks.CancelTasks(ctx, &pb.CancelTasksRequest{TaskIds: []string{id}}))
	fmt.Println("cancelled:", state(get(tasks, id).State))
}

func lease(tasks pb.WorkQueueServiceClient, queue string, count int32) []*pb.Lease {
	wait := durationpb.New(5 * time.Second)
	request := &pb.LeaseTasksRequest{QueueId: queue, WorkerId: workerID, MaxTasks: count, WaitDuration: wait}
	leases := must(tasks.LeaseTasks(ctx, request)).Leases
	for _, one := range leases {
		fmt.Printf("leased %s: %s, attempt %d of %d\n", one.TaskType, shown(one.Input), one.Attempt, one.MaxAttempts)
	}
	return leases
}

func complete(tasks pb.WorkQueueServiceClient, queue string, invoice *pb.Lease) string {
	receipt := &pb.TaskSpec{QueueId: queue, TaskType: "receipt", Input: client.Text("invoice 7 is paid")}
	paid := &pb.Completion{LeaseToken: invoice.LeaseToken, Result: client.Text("paid"), FollowUps: []*pb.TaskSpec{receipt}}
	request := &pb.CompleteTasksRequest{Completions: []*pb.Completion{paid}}
	result := must(tasks.CompleteTasks(ctx, request)).Results[0]
	fmt.Println("completed invoice:", outcome(result))
	fmt.Println("completed invoice again:", completed(tasks, paid))
	failure := &pb.TaskFailure{LeaseToken: invoice.LeaseToken, Failure: &pb.Failure{Reason: "TOO_LATE"}}
	fmt.Println("failed invoice after that:", told(fail(tasks, failure).Status))
	now := get(tasks, invoice.TaskId)
	fmt.Printf("invoice is %s: %s\n", state(now.State), now.Result.GetText())
	return result.FollowUpTaskIds[0]
}

func releaseAndFail(tasks pb.WorkQueueServiceClient, queue string, old *pb.Lease) {
	releases := []*pb.Release{{LeaseToken: old.LeaseToken}}
	released := must(tasks.ReleaseTasks(ctx, &pb.ReleaseTasksRequest{Releases: releases})).Results[0]
	fmt.Println("released thumbnail:", told(released.Status))
	fresh := lease(tasks, queue, 1)[0]
	fmt.Printf("its epoch grew: %t\n", fresh.LeaseEpoch > old.LeaseEpoch)
	stale := completed(tasks, &pb.Completion{LeaseToken: old.LeaseToken})
	fmt.Println("completed thumbnail with the old lease:", stale)
	extension := &pb.Extension{LeaseToken: fresh.LeaseToken, LeaseDuration: durationpb.New(time.Minute)}
	extensions := &pb.ExtendLeasesRequest{Extensions: []*pb.Extension{extension}}
	extended := must(tasks.ExtendLeases(ctx, extensions)).Results[0]
	fmt.Println("extended the new lease:", told(extended.Status))
	failure := &pb.Failure{Reason: "CORRUPT_IMAGE", Message: "cannot decode it"}
	failed := fail(tasks, &pb.TaskFailure{LeaseToken: fresh.LeaseToken, Failure: failure, Final: true})
	fmt.Println("failed thumbnail for good:", state(failed.State))
	dead := get(tasks, fresh.TaskId)
	last := dead.LastFailure
	fmt.Printf("thumbnail is %s: %s in attempt %d\n", state(dead.State), last.Reason, last.Attempt)
}

// work does one task by stream; the worker renews leases, reconnects, and stops gracefully.
func work(tasks pb.WorkQueueServiceClient, queue string) {
	ctx, stop := context.WithCancel(ctx)
	handle := func(_ context.Context, one *pb.Lease) (client.Result, error) {
		fmt.Printf("worked on %s: %s\n", one.TaskType, shown(one.Input))
		stop()
		return client.Result{Payload: client.Text("mailed")}, nil
	}
	worker := client.Worker{Client: tasks, Queue: queue, ID: workerID, Handle: handle}
	if err := worker.Run(ctx); err != nil {
		panic(err)
	}
}

func count(tasks pb.WorkQueueServiceClient, admin pb.WorkQueueAdminServiceClient, queue, receiptID, invoiceID string) {
	wait := &pb.WaitTaskRequest{TaskId: receiptID, WaitDuration: durationpb.New(5 * time.Second)}
	receipt := must(tasks.WaitTask(ctx, wait)).Task
	followUp := receipt.ParentTaskId == invoiceID
	fmt.Printf("receipt is %s: %s, a follow-up of the invoice: %t\n", state(receipt.State), receipt.Result.GetText(), followUp)
	stats := must(admin.GetQueueStats(ctx, &pb.GetQueueStatsRequest{QueueIds: []string{queue}})).Stats[0]
	fmt.Printf("counted: %d ready, %d leased, %d succeeded, %d dead, %d cancelled\n",
		stats.Ready, stats.Leased, stats.Succeeded, stats.Dead, stats.Cancelled)
}

func add(tasks pb.WorkQueueServiceClient, specs ...*pb.TaskSpec) []*pb.EnqueueResult {
	return must(tasks.EnqueueTasks(ctx, &pb.EnqueueTasksRequest{Tasks: specs})).Results
}

func get(tasks pb.WorkQueueServiceClient, id string) *pb.Task {
	return must(tasks.GetTask(ctx, &pb.GetTaskRequest{TaskId: id})).Task
}

func fail(tasks pb.WorkQueueServiceClient, failure *pb.TaskFailure) *pb.FailResult {
	return must(tasks.FailTasks(ctx, &pb.FailTasksRequest{Failures: []*pb.TaskFailure{failure}})).Results[0]
}

func completed(tasks pb.WorkQueueServiceClient, completion *pb.Completion) string {
	request := &pb.CompleteTasksRequest{Completions: []*pb.Completion{completion}}
	return outcome(must(tasks.CompleteTasks(ctx, request)).Results[0])
}

func outcome(result *pb.CompleteResult) string {
	switch ids := len(result.FollowUpTaskIds); {
	case result.Status.GetCode() != 0:
		return told(result.Status)
	case ids == 1:
		return "OK, 1 follow-up"
	default:
		return fmt.Sprintf("OK, %d follow-ups", ids)
	}
}

func told(item *pb.ItemStatus) string {
	if refusal := client.FromItem(item); refusal != nil {
		return refusal.CodeName() + " " + refusal.Reason
	}
	return "OK"
}

func existing(results []*pb.EnqueueResult) (count int) {
	for _, result := range results {
		if result.Existing {
			count++
		}
	}
	return count
}

func shown(payload *pb.Payload) string {
	switch content := payload.Content.(type) {
	case *pb.Payload_Json:
		return fmt.Sprintf("number %.0f", content.Json.GetStructValue().Fields["number"].GetNumberValue())
	case *pb.Payload_Data:
		return fmt.Sprintf("%d bytes", len(content.Data))
	default:
		return payload.GetText()
	}
}

func state(state pb.TaskState) string { return strings.TrimPrefix(state.String(), "TASK_STATE_") }

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
