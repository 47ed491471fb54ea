// The adapter from end to end; prints clients/transcripts/adapter.txt. Give a name of your own to run it twice. It is the app
// that is collected, too: a shop that serves a page of metrics.
// In clients/go, with RETINUE_CONTROL_ADDRESS set to the server's control socket: go run ../examples/adapter.go
package main

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "retinue/adapter/v1"
	"retinue/client"
)

const interval = time.Second

var ctx = context.Background()

// shop is an app with a page in Prometheus' text format.
type shop struct {
	served, failed, jobs atomic.Int64
	broken               atomic.Bool
}

func (s *shop) ServeHTTP(answer http.ResponseWriter, _ *http.Request) {
	if s.broken.Load() {
		answer.WriteHeader(http.StatusInternalServerError)
		return
	}
	answer.Header().Set("Content-Type", "text/plain")
	fmt.Fprintf(answer, `# TYPE http_requests_total counter
http_requests_total{code="200"} %d
http_requests_total{code="500"} %d
# TYPE queue_age_milliseconds gauge
queue_age_milliseconds 1500
# TYPE process_open_fds gauge
process_open_fds 5
# TYPE process_max_fds gauge
process_max_fds 20
# TYPE jobs_total counter
jobs_total %d
`, s.served.Load(), s.failed.Load(), s.jobs.Load())
}

func main() {
	name := "transcript"
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	channel, control := must(client.Dial("adapter")), must(client.Dial("control"))
	defer channel.Close()
	defer control.Close()
	app, operator := pb.NewAdapterServiceClient(channel), pb.NewAdapterServiceClient(control)
	page, served := must(net.Listen("tcp", "127.0.0.1:0")), &shop{}
	served.served.Store(90)
	served.failed.Store(10)
	served.jobs.Store(-3)
	go http.Serve(page, served)
	wanted := &pb.Target{
		TargetId: name, Kind: pb.TargetKind_TARGET_KIND_PROMETHEUS, IntervalDuration: durationpb.New(interval),
		Endpoint: fmt.Sprintf("http://%s/metrics", page.Addr()),
	}
	refuse(app, operator, wanted)
	attempt(operator, wanted)
	served.jobs.Store(3)
	create(operator, wanted)
	look(app, name)
	watching := (&client.Adapter{Client: app}).Watch(ctx, &pb.Match{Name: "http_requests", TargetIds: []string{name}})
	changes, stop := iter.Pull2(watching)
	defer stop()
	next := func() *client.Change { change, err, _ := changes(); return must(change, err) }
	watch(app, next, served, name)
	spoil(app, served, name)
	report(app, operator, name)
	remove(operator, next, name)
}

func refuse(app, operator pb.AdapterServiceClient, wanted *pb.Target) {
	_, err := app.CreateTarget(ctx, &pb.CreateTargetRequest{Target: wanted})
	fmt.Println("an app declares a target:", told(err))
	nonsense := &pb.Target{
		TargetId: "no spaces, please", Kind: pb.TargetKind_TARGET_KIND_REDIS, Endpoint: "nowhere",
		IntervalDuration: durationpb.New(interval / 2),
	}
	_, err = operator.CreateTarget(ctx, &pb.CreateTargetRequest{Target: nonsense})
	fmt.Println("declared nonsense:", told(err))
	fields := client.FromError(err).Fields
	slices.SortFunc(fields, func(a, b client.Field) int { return strings.Compare(a.Path, b.Path) })
	for _, field := range fields {
		fmt.Println(" ", field.Path)
	}
	unknown := &pb.Target{
		TargetId: wanted.TargetId, Kind: pb.TargetKind_TARGET_KIND_JSON, Endpoint: wanted.Endpoint, RulePack: "nobody-knows",
	}
	_, err = operator.CreateTarget(ctx, &pb.CreateTargetRequest{Target: unknown})
	fmt.Println("declared with a rule pack that nobody knows:", told(err))
}

// attempt makes a dry run: what comes beside what becomes of it.
func attempt(operator pb.AdapterServiceClient, wanted *pb.Target) {
	found := must(operator.TestTarget(ctx, &pb.TestTargetRequest{Target: wanted}))
	fmt.Printf("tried, %d points:\n", len(found.Points))
	for _, point := range found.Points {
		fmt.Printf("  %s becomes %s\n", point.Raw, cmp.Or(bare(point.Normalised), "nothing: "+point.Rejection))
	}
	_, err := operator.GetTarget(ctx, &pb.GetTargetRequest{TargetId: wanted.TargetId})
	fmt.Println("nothing is kept of it:", told(err))
}

func create(operator pb.AdapterServiceClient, wanted *pb.Target) {
	wait := durationpb.New(10 * time.Second)
	made := must(operator.CreateTarget(ctx, &pb.CreateTargetRequest{Target: wanted, WaitDuration: wait})).Target
	fmt.Printf("created: %s, %d series\n", state(made), made.Status.Series)
	again := must(operator.CreateTarget(ctx, &pb.CreateTargetRequest{Target: wanted})).Target
	fmt.Printf("created again: the same: %t\n", again.Etag == made.Etag)
	named := proto.CloneOf(wanted)
	named.Service = "shop"
	_, err := operator.CreateTarget(ctx, &pb.CreateTargetRequest{Target: named})
	fmt.Println("created with another service:", told(err))
	_, err = operator.UpdateTarget(ctx, &pb.UpdateTargetRequest{Target: named, Etag: "0"})
	fmt.Println("updated under an etag of long ago:", told(err))
	updated := must(operator.UpdateTarget(ctx, &pb.UpdateTargetRequest{Target: named, Etag: made.Etag})).Target
	fmt.Printf("updated: of service %s, another etag: %t\n", updated.Service, updated.Etag != made.Etag)
}

func look(app pb.AdapterServiceClient, name string) {
	fmt.Println("its golden signals:")
	for _, signal := range signals(app, name) {
		fmt.Println(" ", shown(signal))
	}
	matches := []*pb.Match{{TargetIds: []string{name}}}
	fmt.Println("described:")
	for _, metric := range must(app.DescribeMetrics(ctx, &pb.DescribeMetricsRequest{Matches: matches})).Metrics {
		unit := ""
		if metric.Unit != "" {
			unit = " in " + metric.Unit
		}
		fmt.Printf("  %s: %s%s\n", metric.Name, strings.TrimPrefix(metric.Type.String(), "METRIC_TYPE_"), unit)
	}
	matches[0].Name = "queue_*"
	request := &pb.GetMetricsRequest{Matches: matches, MaxAgeDuration: durationpb.New(time.Minute)}
	metric := must(app.GetMetrics(ctx, request)).Metrics[0]
	fmt.Printf("read: %s is %g\n", metric.Name, metric.Series[0].GetNumber())
}

func watch(app pb.AdapterServiceClient, next func() *client.Change, served *shop, name string) {
	first := next()
	fmt.Printf("watched: %s; the snapshot is complete: %t\n", counts(first), first.Synced)
	served.served.Add(30)
	fmt.Println("30 more requests, the watch tells:", counts(next()))
	requests := signals(app, name)[0]
	fmt.Printf("requests are %g, their rate is known: %t\n", requests.GetNumber(), requests.Rate != nil)
}

// spoil shows that a point that makes no sense costs itself, and an app that is away nothing of what was collected.
func spoil(app pb.AdapterServiceClient, served *shop, name string) {
	served.jobs.Store(-3)
	refused := until(app, name, "degraded").Rejections[0]
	fmt.Printf("a counter below zero: degraded, refused for %s: %t\n", refused.Reason, refused.Points > 0)
	served.broken.Store(true)
	fmt.Println("the page breaks: stale,", until(app, name, "stale").Message)
	fmt.Println("what was collected stands:", shown(signals(app, name)[0]))
	served.broken.Store(false)
	served.jobs.Store(4)
	until(app, name, "up")
	fmt.Println("it is mended: up")
}

// report is what an app tells by itself.
func report(app, operator pb.AdapterServiceClient, name string) {
	own, adapter := name+"-own", &client.Adapter{Client: app}
	target := &pb.Target{
		TargetId: own, Kind: pb.TargetKind_TARGET_KIND_REPORT, IntervalDuration: durationpb.New(interval), Service: "shop",
	}
	must(operator.CreateTarget(ctx, &pb.CreateTargetRequest{Target: target}))
	age := client.Gauge("cart_age", 2500, map[string]string{"kind": "guest"})
	age.Unit = "ms"
	points := []*pb.Metric{age, client.Counter("orders", 17, nil), client.Counter("refunds", -1, nil)}
	reported := must(adapter.Report(ctx, own, points...))
	fmt.Printf("reported %d points of our own: %d taken, refused for %s\n",
		len(points), reported.AcceptedPoints, reported.Rejections[0].Reason)
	for change, err := range adapter.Watch(ctx, &pb.Match{TargetIds: []string{own}}) {
		check(err)
		for _, metric := range change.Metrics {
			series := metric.Series[0]
			fmt.Printf("  %s is %g, service %s\n", metric.Name, series.GetNumber(), series.Labels["service"])
		}
		if len(change.Metrics) > 0 {
			break
		}
	}
	_, err := adapter.Report(ctx, name, points...)
	fmt.Println("reported to a target that is collected:", told(err))
	must(operator.DeleteTarget(ctx, &pb.DeleteTargetRequest{TargetId: own}))
}

func remove(operator pb.AdapterServiceClient, next func() *client.Change, name string) {
	request := &pb.DeleteTargetRequest{TargetId: name}
	first, second := must(operator.DeleteTarget(ctx, request)), must(operator.DeleteTarget(ctx, request))
	fmt.Printf("deleted: %t, again: %t\n", first.Deleted, second.Deleted)
	gone := 0
	for gone == 0 {
		for _, metric := range next().Metrics {
			for _, series := range metric.Series {
				if series.Stale {
					gone++
				}
			}
		}
	}
	fmt.Printf("the watch tells: %d series are gone\n", gone)
	_, err := operator.GetTarget(ctx, &pb.GetTargetRequest{TargetId: name})
	fmt.Println("asked for it:", told(err))
}

// until waits for a state and gives the status of the target, which then is in it.
func until(app pb.AdapterServiceClient, name, wanted string) *pb.TargetStatus {
	for {
		found := must(app.GetTarget(ctx, &pb.GetTargetRequest{TargetId: name})).Target
		if state(found) == wanted {
			return found.Status
		}
		time.Sleep(interval / 10)
	}
}

func signals(app pb.AdapterServiceClient, name string) []*pb.Signal {
	return must(app.GetSignals(ctx, &pb.GetSignalsRequest{TargetIds: []string{name}})).Signals[0].Signals
}

func state(target *pb.Target) string {
	return strings.ToLower(strings.TrimPrefix(target.Status.State.String(), "TARGET_STATE_"))
}

// counts shows them by the label code.
func counts(change *client.Change) string {
	var found []string
	for _, metric := range change.Metrics {
		for _, series := range metric.Series {
			found = append(found, fmt.Sprintf("%s %g", series.Labels["code"], series.GetNumber()))
		}
	}
	slices.Sort(found)
	return strings.Join(found, ", ")
}

func shown(signal *pb.Signal) string {
	kind := strings.ToLower(strings.TrimPrefix(signal.Kind.String(), "SIGNAL_KIND_"))
	if signal.AbsentReason != "" {
		return fmt.Sprintf("%s absent: %s", kind, signal.AbsentReason)
	}
	return fmt.Sprintf("%s %g of %s", kind, signal.GetNumber(), signal.Source)
}

// bare is a line of /metrics without its labels.
func bare(sample string) string {
	name, rest, _ := strings.Cut(sample, "{")
	return strings.TrimSpace(name + rest[strings.LastIndex(rest, "}")+1:])
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
