package client

import (
	"context"
	"iter"
	"math/rand/v2"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	adapterv1 "retinue/adapter/v1"
)

// What one report may have: the contract's limit, and what is safely below gRPC's.
const (
	mostSeries = 1000
	mostBytes  = 3 << 20
)

// Adapter is the adapter, for those who watch what it collects and those who tell it of themselves. What is one call is in the
// stub.
type Adapter struct {
	// Client is the server. Required.
	Client adapterv1.AdapterServiceClient
}

// Change is a part of a snapshot, or what changed since.
type Change struct {
	*adapterv1.WatchMetricsResponse
	// Begins tells that a snapshot begins, since the watch did or had to begin anew: forget what was known before.
	Begins bool
}

// Watch tells of what any of the matches selects, or of all: a snapshot, then each change. When a connection is lost it begins
// anew, with a snapshot. It ends with ctx, with the loop, or with an error that stays, which comes last.
func (a *Adapter) Watch(ctx context.Context, matches ...*adapterv1.Match) iter.Seq2[*Change, error] {
	request := &adapterv1.WatchMetricsRequest{Matches: matches}
	return func(yield func(*Change, error) bool) {
		begins := true
		open := func(ctx context.Context) (grpc.ServerStreamingClient[adapterv1.WatchMetricsResponse], error) {
			begins = true
			return a.Client.WatchMetrics(ctx, request)
		}
		for response, err := range resumed(ctx, open) {
			if err != nil {
				yield(nil, err)
				return
			}
			if !yield(&Change{response, begins}, nil) {
				return
			}
			begins = false
		}
	}
}

// WatchSignals tells of the golden signals of these targets or of all, and again whenever one changes; a target that is gone has
// none. It goes on over lost connections, and ends as Watch does.
func (a *Adapter) WatchSignals(ctx context.Context, targetIDs ...string) iter.Seq2[*adapterv1.Signals, error] {
	request := &adapterv1.WatchSignalsRequest{TargetIds: targetIDs}
	return func(yield func(*adapterv1.Signals, error) bool) {
		open := func(ctx context.Context) (grpc.ServerStreamingClient[adapterv1.WatchSignalsResponse], error) {
			return a.Client.WatchSignals(ctx, request)
		}
		for response, err := range resumed(ctx, open) {
			if !yield(response.GetSignals(), err) {
				return
			}
		}
	}
}

// Report tells the server what this app says of itself, in as many calls as it takes. A point replaces the one of its series,
// so that it is safe to repeat; points that are refused keep no others from being taken, and are in the answer.
func (a *Adapter) Report(ctx context.Context, targetID string, metrics ...*adapterv1.Metric) (*adapterv1.ReportMetricsResponse, error) {
	total, refused := &adapterv1.ReportMetricsResponse{}, map[string]*adapterv1.Rejection{}
	for _, batch := range batches(metrics) {
		request := &adapterv1.ReportMetricsRequest{TargetId: targetID, Metrics: batch}
		response, err := a.Client.ReportMetrics(ctx, request, grpc.WaitForReady(true))
		if err != nil {
			return total, err
		}
		total.AcceptedPoints += response.AcceptedPoints
		for _, one := range response.Rejections {
			if known := refused[one.Reason]; known != nil {
				known.Points += one.Points
				continue
			}
			refused[one.Reason] = one
			total.Rejections = append(total.Rejections, one)
		}
	}
	return total, nil
}

// Gauge is a point for a report: what goes up and down.
func Gauge(name string, value float64, labels map[string]string) *adapterv1.Metric {
	return point(adapterv1.MetricType_METRIC_TYPE_GAUGE, name, value, labels)
}

// Counter is a point for a report: what only grows. The name has no _total.
func Counter(name string, value float64, labels map[string]string) *adapterv1.Metric {
	return point(adapterv1.MetricType_METRIC_TYPE_COUNTER, name, value, labels)
}

func point(kind adapterv1.MetricType, name string, value float64, labels map[string]string) *adapterv1.Metric {
	series := &adapterv1.Series{Labels: labels, Value: &adapterv1.Series_Number{Number: value}}
	return &adapterv1.Metric{Name: name, Type: kind, Series: []*adapterv1.Series{series}}
}

// resumed reads a stream, and opens it again when it ends or breaks, until ctx is done.
func resumed[T any](
	ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[T], error),
) iter.Seq2[*T, error] {
	return func(yield func(*T, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		wait := firstWait
		for ctx.Err() == nil {
			stream, err := open(ctx)
			for err == nil {
				var response *T
				if response, err = stream.Recv(); err == nil {
					wait = firstWait
					if !yield(response, nil) {
						return
					}
				}
			}
			if !hopeful(err) {
				yield(nil, err)
				return
			}
			pause(ctx, wait/2+rand.N(wait/2))
			wait = min(2*wait, longestWait)
		}
	}
}

// batches makes reports that are not too large: a metric with many series is told in parts.
func batches(metrics []*adapterv1.Metric) (all [][]*adapterv1.Metric) {
	var batch []*adapterv1.Metric
	series, size := 0, 0
	for _, metric := range parts(metrics) {
		count, length := len(metric.Series), proto.Size(metric)
		if len(batch) > 0 && (series+count > mostSeries || size+length > mostBytes) {
			all, batch, series, size = append(all, batch), nil, 0, 0
		}
		batch, series, size = append(batch, metric), series+count, size+length
	}
	if len(batch) > 0 {
		all = append(all, batch)
	}
	return all
}

func parts(metrics []*adapterv1.Metric) (all []*adapterv1.Metric) {
	for _, metric := range metrics {
		count := len(metric.Series)
		if count <= 1 || (count <= mostSeries && proto.Size(metric) <= mostBytes) {
			all = append(all, metric)
			continue
		}
		half := func(series []*adapterv1.Series) *adapterv1.Metric {
			return &adapterv1.Metric{Name: metric.Name, Type: metric.Type, Unit: metric.Unit, Help: metric.Help, Series: series}
		}
		all = append(all, parts([]*adapterv1.Metric{half(metric.Series[:count/2]), half(metric.Series[count/2:])})...)
	}
	return all
}
