// Command load asks over so many connections at once, each waiting for its answer before it asks again, and compares every
// answer, byte by byte, with what it has to be. Each line on stdin is one such run.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"time"

	"bench/ambassador/polling"
	"bench/scatter/lines"
)

type command struct {
	Address string  `json:"address"`
	Kind    string  `json:"kind"`    // get, set: of memcached; http; echo
	Clients int     `json:"clients"` // connections
	Seconds float64 `json:"seconds"`
	Keys    int     `json:"keys"`  // of memcached
	Bytes   int     `json:"bytes"` // of a value, a page, or what is echoed
	All     bool    `json:"all"`   // each key once, instead of any for some seconds
}

// exchange is what is asked, and what the answer has to be.
type exchange struct{ request, answer []byte }

func (c command) exchanges() []exchange {
	switch c.Kind {
	case "get", "set":
		made := make([]exchange, c.Keys)
		for number := range made {
			made[number] = c.item(number)
		}
		return made
	case "http":
		return []exchange{{[]byte("GET /some/path HTTP/1.1\r\nHost: test\r\nAccept: */*\r\n\r\n"), bytes.Repeat([]byte("x"), c.Bytes)}}
	default:
		said := bytes.Repeat([]byte("e"), c.Bytes)
		return []exchange{{said, said}}
	}
}

// item is a key and its value, which has the key in it.
func (c command) item(number int) exchange {
	key := fmt.Sprintf("key:%08d", number)
	value := bytes.Repeat([]byte(key+"."), c.Bytes/len(key)+1)[:c.Bytes]
	if c.Kind == "set" {
		return exchange{fmt.Appendf(nil, "set %s 0 0 %d\r\n%s\r\n", key, c.Bytes, value), []byte("STORED\r\n")}
	}
	return exchange{fmt.Appendf(nil, "get %s\r\n", key), fmt.Appendf(nil, "VALUE %s 0 %d\r\n%s\r\nEND\r\n", key, c.Bytes, value)}
}

// client is a connection.
type client struct {
	fd    int
	asked *exchange
	begun time.Time
	got   []byte
}

// ended says whether the answer is all there, and fails if it is another one.
func (c *client) ended(web bool) (bool, error) {
	got := c.got
	if web {
		head, body, found := bytes.Cut(got, []byte("\r\n\r\n"))
		if !found {
			return false, nil
		}
		if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) || !sized(head, len(c.asked.answer)) {
			return false, fmt.Errorf("the answer was %q", head)
		}
		got = body
	}
	if len(got) < len(c.asked.answer) && bytes.HasPrefix(c.asked.answer, got) {
		return false, nil
	}
	if !bytes.Equal(got, c.asked.answer) {
		return false, fmt.Errorf("%.60q was answered with %.200q", c.asked.request, got)
	}
	return true, nil
}

// sized says whether a head tells of so many bytes.
func sized(head []byte, count int) bool {
	return bytes.Contains(bytes.ToLower(head), []byte("content-length: "+strconv.Itoa(count)))
}

// run is one command being done.
type run struct {
	command
	exchanges []exchange
	clients   map[int]*client
	next      int
	took      []time.Duration
	buffer    []byte
}

func (r *run) ask(c *client) error {
	at := rand.IntN(len(r.exchanges))
	if r.All {
		at = min(r.next, len(r.exchanges)-1)
	}
	r.next++
	c.asked, c.got, c.begun = &r.exchanges[at], c.got[:0], time.Now()
	return polling.Write(c.fd, c.asked.request)
}

func (r *run) read(fd int) error {
	c := r.clients[fd]
	count, err := syscall.Read(fd, r.buffer)
	if err != nil {
		return err
	}
	if count == 0 {
		return errors.New("the connection was closed")
	}
	c.got = append(c.got, r.buffer[:count]...)
	ended, err := c.ended(r.Kind == "http")
	if err != nil || !ended {
		return err
	}
	r.took = append(r.took, time.Since(c.begun))
	return r.ask(c)
}

func (r *run) over(begun time.Time) bool {
	if r.All {
		return len(r.took) >= len(r.exchanges)
	}
	return time.Since(begun).Seconds() >= r.Seconds
}

func (r *run) play() (time.Duration, error) {
	poll, err := polling.New()
	if err != nil {
		return 0, err
	}
	defer poll.Close()
	for range r.Clients {
		fd, err := polling.Dial(r.Address)
		if err != nil {
			return 0, err
		}
		defer syscall.Close(fd)
		r.clients[fd] = &client{fd: fd}
		if err := poll.Add(fd); err != nil {
			return 0, err
		}
	}
	begun := time.Now()
	for _, c := range r.clients {
		if err := r.ask(c); err != nil {
			return 0, err
		}
	}
	for last := begun; !r.over(begun); {
		if time.Since(last) > 10*time.Second {
			return 0, errors.New("no answer in ten seconds")
		}
		before := len(r.took)
		if err := poll.Each(1000, r.read); err != nil {
			return 0, err
		}
		if len(r.took) > before {
			last = time.Now()
		}
	}
	return time.Since(begun), nil
}

func (c command) do() any {
	r := &run{command: c, exchanges: c.exchanges(), clients: map[int]*client{}, buffer: make([]byte, 1<<18)}
	within, err := r.play()
	if err != nil {
		return map[string]string{"error": err.Error()}
	}
	slices.Sort(r.took)
	at := func(share float64) float64 {
		return r.took[min(len(r.took)-1, int(share*float64(len(r.took))))].Seconds() * 1e6
	}
	return map[string]float64{"calls": float64(len(r.took)), "seconds": within.Seconds(), "p50_us": at(0.5), "p99_us": at(0.99)}
}

func main() {
	runtime.LockOSThread()
	lines.Say(map[string]bool{"ready": true})
	lines.Serve(command.do)
}
