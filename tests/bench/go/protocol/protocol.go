// Package protocol is what `protocol.py` says, for Go.
package protocol

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const (
	Bulk   = 100
	Window = 64
)

var pad = strings.Repeat("x", 96)

// Task is what every system carries.
type Task struct {
	ID  int    `json:"id"`
	Pad string `json:"pad"`
}

func NewTask(number int) Task { return Task{number, pad} }

// Command is a line from the harness.
type Command struct {
	Do, Queue, Mode string
	First, Count    int
	Times           []float64
}

type answer = map[string]any

func Say(message answer) {
	line, _ := json.Marshal(message)
	fmt.Printf("%s\n", line)
}

// Now is CLOCK_MONOTONIC, as the other languages read it.
func Now() int64 {
	var at syscall.Timespec
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, 1, uintptr(unsafe.Pointer(&at)), 0)
	return at.Nano()
}

// Produce answers commands until stdin ends.
func Produce(handlers map[string]func(Command) (answer, error)) {
	Say(answer{"event": "ready"})
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	for lines.Scan() {
		var command Command
		err := json.Unmarshal(lines.Bytes(), &command)
		var found answer
		if err == nil {
			found, err = handlers[command.Do](command)
		}
		if err != nil {
			found = answer{"error": err.Error()}
		}
		Say(found)
	}
}

// Share sends blocks of numbers [at, end) from so many goroutines, each awaiting its send; it takes the time.
func Share(first, count, step, loops int, send func(at, end int) error) (answer, error) {
	start := time.Now()
	var group sync.WaitGroup
	var failed error
	var lock sync.Mutex
	next := first
	take := func() (int, bool) {
		lock.Lock()
		defer lock.Unlock()
		at := next
		next += step
		return at, at < first+count && failed == nil
	}
	for range loops {
		group.Add(1)
		go func() {
			defer group.Done()
			for at, more := take(); more; at, more = take() {
				if err := send(at, min(at+step, first+count)); err != nil {
					lock.Lock()
					failed = err
					lock.Unlock()
				}
			}
		}()
	}
	group.Wait()
	return answer{"seconds": time.Since(start).Seconds()}, failed
}

// WhenDue sends task i at times[i], without waiting for the answers before.
func WhenDue(times []float64, send func(number int) error) (answer, error) {
	start := Now()
	var group sync.WaitGroup
	var lock sync.Mutex
	var failed error
	for number, due := range times {
		time.Sleep(time.Duration(due*1e9) - time.Duration(Now()-start))
		group.Add(1)
		go func() {
			defer group.Done()
			if err := send(number); err != nil {
				lock.Lock()
				failed = err
				lock.Unlock()
			}
		}()
	}
	group.Wait()
	return answer{"start_ns": start}, failed
}

// Record notes which tasks were handled and when.
type Record struct {
	lock  sync.Mutex
	count int
	path  string
	ids   []int
	times []int64
	cpu   float64
}

func NewRecord(count int, path string) *Record {
	record := &Record{count: count, path: path}
	go record.untilAsked()
	return record
}

func (r *Record) Add(number int) {
	r.lock.Lock()
	defer r.lock.Unlock()
	if len(r.ids) == 0 {
		r.cpu = used()
	}
	r.ids, r.times = append(r.ids, number), append(r.times, Now())
	if len(r.ids) == r.count {
		Say(answer{"event": "done", "first_ns": r.times[0], "last_ns": r.times[r.count-1], "cpu_seconds": used() - r.cpu})
	}
}

func (r *Record) untilAsked() {
	os.Stdin.Read(make([]byte, 1))
	r.lock.Lock()
	var text strings.Builder
	for at, number := range r.ids {
		fmt.Fprintf(&text, "%d %d\n", number, r.times[at])
	}
	os.WriteFile(r.path, []byte(text.String()), 0o644)
	Say(answer{"event": "written"})
	os.Exit(0)
}

func used() float64 {
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}
