package client_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "retinue/adapter/v1"
	"retinue/client"
)

// script is an adapter whose streams say what stands in it and break, but for the last: then it refuses. Of reports it refuses
// one point each.
type script struct {
	pb.UnimplementedAdapterServiceServer
	streams [][]*pb.WatchMetricsResponse
	signals []float64
	reports []*pb.ReportMetricsRequest
}

func (s *script) WatchMetrics(_ *pb.WatchMetricsRequest, stream grpc.ServerStreamingServer[pb.WatchMetricsResponse]) error {
	if len(s.streams) == 0 {
		return status.Error(codes.InvalidArgument, "no more")
	}
	told := s.streams[0]
	s.streams = s.streams[1:]
	for _, response := range told {
		if err := stream.Send(response); err != nil {
			return err
		}
	}
	if len(s.streams) == 0 {
		return nil
	}
	return status.Error(codes.Unavailable, "gone")
}

func (s *script) WatchSignals(_ *pb.WatchSignalsRequest, stream grpc.ServerStreamingServer[pb.WatchSignalsResponse]) error {
	if len(s.signals) == 0 {
		return status.Error(codes.NotFound, "no more")
	}
	signal := &pb.Signal{Value: &pb.Signal_Number{Number: s.signals[0]}}
	s.signals = s.signals[1:]
	return stream.Send(&pb.WatchSignalsResponse{Signals: &pb.Signals{Signals: []*pb.Signal{signal}}})
}

func (s *script) ReportMetrics(_ context.Context, request *pb.ReportMetricsRequest) (*pb.ReportMetricsResponse, error) {
	s.reports = append(s.reports, request)
	return &pb.ReportMetricsResponse{
		AcceptedPoints: int32(seriesOf(request) - 1),
		Rejections:     []*pb.Rejection{{Reason: "negative_counter", Points: 1, Example: "the first"}},
	}, nil
}

func seriesOf(request *pb.ReportMetricsRequest) (count int) {
	for _, metric := range request.Metrics {
		count += len(metric.Series)
	}
	return count
}

func (s *script) adapter(t *testing.T) *client.Adapter {
	path := filepath.Join(must(os.MkdirTemp("", "adapter")), "s")
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(path)) })
	server, listener := grpc.NewServer(), must(net.Listen("unix", path))
	pb.RegisterAdapterServiceServer(server, s)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	channel := must(grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { channel.Close() })
	return &client.Adapter{Client: pb.NewAdapterServiceClient(channel)}
}

func TestAWatchBeginsAnewAfterABreakAndAfterAnEndAndSaysSo(t *testing.T) {
	synced := &pb.WatchMetricsResponse{Synced: true}
	s := &script{streams: [][]*pb.WatchMetricsResponse{{{}, synced, {Coalesced: 2}}, {synced}, {synced}}}
	var told []string
	var last error
	for change, err := range s.adapter(t).Watch(t.Context()) {
		if last = err; err == nil {
			told = append(told, fmt.Sprint(change.Begins, change.Synced, change.Coalesced))
		}
	}
	wanted := "true false 0, false true 0, false false 2, true true 0, true true 0"
	if got := strings.Join(told, ", "); got != wanted {
		t.Errorf("the watch told %s, not %s", got, wanted)
	}
	if code := client.FromError(last).CodeName(); code != "INVALID_ARGUMENT" {
		t.Errorf("it ended with %s", code)
	}
}

func TestAWatchOfSignalsGoesOnUntilItIsRefused(t *testing.T) {
	s := &script{signals: []float64{1, 2, 3}}
	var told []float64
	var last error
	for signals, err := range s.adapter(t).WatchSignals(t.Context(), "web") {
		if last = err; err == nil {
			told = append(told, signals.Signals[0].GetNumber())
		}
	}
	if fmt.Sprint(told) != "[1 2 3]" || client.FromError(last).CodeName() != "NOT_FOUND" {
		t.Errorf("the watch told %v and ended with %v", told, last)
	}
}

func TestAWatchEndsWithItsContextWithoutAnError(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := &script{streams: [][]*pb.WatchMetricsResponse{{{Synced: true}}, {{Synced: true}}}}
	for _, err := range s.adapter(t).Watch(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		cancel()
	}
}

func TestReportsAreNotTooLargeAndLoseNothing(t *testing.T) {
	many := client.Gauge("rows", 0, nil)
	for row := range 2500 {
		many.Series = append(many.Series, client.Gauge("", float64(row), map[string]string{"row": fmt.Sprint(row)}).Series...)
	}
	s := &script{}
	answer := must(s.adapter(t).Report(t.Context(), "own", many, client.Counter("orders", 17, nil)))
	total := 0
	for _, report := range s.reports {
		if count := seriesOf(report); count > 1000 {
			t.Errorf("a report has %d series", count)
		}
		total += seriesOf(report)
	}
	refused := len(s.reports)
	if total != 2502 || int(answer.AcceptedPoints) != total-refused {
		t.Errorf("%d series were told, %d taken", total, answer.AcceptedPoints)
	}
	if len(answer.Rejections) != 1 || int(answer.Rejections[0].Points) != refused {
		t.Errorf("rejections are %v", answer.Rejections)
	}
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
