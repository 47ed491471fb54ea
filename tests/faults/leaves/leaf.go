// Leaves in one process, each on a port of its own, which do what they are told and write down what they were asked.
//
// The same as tests/support/scatter_faults/leaf.py, which says how it is spoken to; it has no replies that are no message.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "retinue/scattergather/v1"
)

const perProcess = 1_000_000_000

// The lines of a history; see tests/support/scatter_faults/history.py.

type got struct {
	Type    string `json:"type"`
	At      int64  `json:"at"`
	Leaf    string `json:"leaf"`
	Serial  int64  `json:"serial"`
	Request string `json:"request"`
	Shard   string `json:"shard"`
	Attempt int32  `json:"attempt"`
	LeftNs  int64  `json:"left_ns"`
}

type gave struct {
	Type   string `json:"type"`
	At     int64  `json:"at"`
	Serial int64  `json:"serial"`
	End    string `json:"end"`
}

// book appends lines to a file; each is handed to the kernel at once, so that it outlives a SIGKILL.
type book struct {
	mu   sync.Mutex
	file *os.File
	last int64
}

func now() int64 {
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		log.Fatal(err)
	}
	return boot.Nano()
}

func (b *book) note(event any) {
	line, err := json.Marshal(event)
	if err == nil {
		_, err = b.file.Write(append(line, '\n'))
	}
	if err != nil {
		log.Fatal(err) // a history with holes proves nothing
	}
}

func (b *book) got(leaf string, query *pb.QueryRequest, left time.Duration) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.last++
	request, _, _ := strings.Cut(string(query.Payload), " ")
	b.note(got{"got", now(), leaf, b.last, request, query.ShardId, query.Attempt, left.Nanoseconds()})
	return b.last
}

func (b *book) gave(serial int64, end string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.note(gave{"gave", now(), serial, end})
}

type behaviour struct {
	Kind   string  `json:"kind"`
	DelayS float64 `json:"delay_s"`
	Code   uint32  `json:"code"`
	Size   int     `json:"size"`
}

type leaf struct {
	pb.UnimplementedLeafServiceServer
	name string
	book *book
	does atomic.Pointer[behaviour]
	turn atomic.Int64
}

// Query answers for whichever shard it is asked for, or does what it was told.
func (l *leaf) Query(ctx context.Context, query *pb.QueryRequest) (*pb.QueryResponse, error) {
	left := time.Duration(-1)
	if deadline, ok := ctx.Deadline(); ok {
		left = time.Until(deadline)
	}
	serial, does := l.book.got(l.name, query, left), l.does.Load()
	select {
	case <-time.After(time.Duration(does.DelayS * float64(time.Second))):
	case <-ctx.Done():
		return l.cancelled(ctx, serial)
	}
	if does.Kind == "fail" || (does.Kind == "flap" && (l.turn.Add(1)-1)%2 == 0) {
		l.book.gave(serial, strings.ToUpper(codes.Code(does.Code).String()))
		return nil, status.Error(codes.Code(does.Code), "as it was told")
	}
	if does.Kind == "stall" {
		if err := grpc.SendHeader(ctx, metadata.MD{}); err != nil {
			log.Print(err)
		}
		<-ctx.Done()
		return l.cancelled(ctx, serial)
	}
	if ctx.Err() != nil {
		return l.cancelled(ctx, serial)
	}
	return l.reply(query, serial, does), nil
}

func (l *leaf) cancelled(ctx context.Context, serial int64) (*pb.QueryResponse, error) {
	l.book.gave(serial, "cancelled")
	return nil, status.FromContextError(ctx.Err()).Err()
}

func (l *leaf) reply(query *pb.QueryRequest, serial int64, does *behaviour) *pb.QueryResponse {
	end, response := "answered", &pb.QueryResponse{Payload: said(query, serial)}
	switch does.Kind {
	case "corrupt":
		end, response = "corrupt", &pb.QueryResponse{Coverage: &pb.Coverage{Expected: 1, Answered: 5}}
	case "part":
		end, response.Coverage = "part", &pb.Coverage{Expected: 2, Answered: 1}
	case "oversize":
		response.Payload = append(response.Payload, make([]byte, does.Size)...)
	}
	l.book.gave(serial, end)
	return response
}

// said is the payload of a reply: a line, or for merges of JSON a group of its own.
func said(query *pb.QueryRequest, serial int64) []byte {
	request, form, _ := strings.Cut(string(query.Payload), " ")
	if form == "groups" {
		return fmt.Appendf(nil, `{%q: %d}`, query.ShardId, serial)
	}
	return fmt.Appendf(nil, "%s %s %d\n", request, query.ShardId, serial)
}

func serve(l *leaf, address string) (string, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return "", err
	}
	server := grpc.NewServer(grpc.MaxSendMsgSize(1 << 30))
	pb.RegisterLeafServiceServer(server, l)
	go func() { log.Fatal(server.Serve(listener)) }()
	return listener.Addr().String(), nil
}

func main() {
	number := flag.Int64("number", 0, "of this process")
	history := flag.String("history", "", "where to write")
	named := flag.String("leaves", "", "NAME=HOST:PORT,...")
	flag.Parse()
	path := filepath.Join(*history, fmt.Sprintf("leaf-%d.jsonl", *number))
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	book, leaves, addresses := &book{file: file, last: *number * perProcess}, map[string]*leaf{}, map[string]string{}
	for _, one := range strings.Split(*named, ",") {
		name, address, _ := strings.Cut(one, "=")
		leaves[name] = &leaf{name: name, book: book}
		leaves[name].does.Store(&behaviour{Kind: "answer"})
		if addresses[name], err = serve(leaves[name], address); err != nil {
			log.Fatal(err)
		}
	}
	line, _ := json.Marshal(addresses)
	fmt.Println(string(line))
	obey(leaves)
}

func obey(leaves map[string]*leaf) {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var told struct {
			Leaf      string    `json:"leaf"`
			Behaviour behaviour `json:"behaviour"`
		}
		if err := json.Unmarshal(lines.Bytes(), &told); err != nil {
			log.Fatal(err)
		}
		leaves[told.Leaf].does.Store(&told.Behaviour)
		fmt.Println("ok")
	}
}
