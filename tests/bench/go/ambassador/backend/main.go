// Command backend is what stands behind a proxy: one port answers every HTTP/1.1 request that has no body with the same 100
// bytes, one sends back whatever it gets. It prints where.
package main

import (
	"bytes"
	"runtime"
	"strings"
	"syscall"

	"bench/ambassador/polling"
	"bench/scatter/lines"
)

var page = []byte("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 100\r\n\r\n" + strings.Repeat("x", 100))

var headEnd = []byte("\r\n\r\n")

// connection is one that was accepted.
type connection struct {
	web  bool
	rest []byte
}

// answers are what to say to what has come.
func (c *connection) answers(data []byte) []byte {
	if !c.web {
		return data
	}
	c.rest = append(c.rest, data...)
	count := bytes.Count(c.rest, headEnd)
	if count == 0 {
		return nil
	}
	c.rest = append(c.rest[:0], c.rest[bytes.LastIndex(c.rest, headEnd)+len(headEnd):]...)
	if count == 1 {
		return page
	}
	return bytes.Repeat(page, count)
}

func main() {
	runtime.LockOSThread()
	poll, err := polling.New()
	lines.Check(err)
	web, webPort, err := polling.Listen()
	lines.Check(err)
	echo, echoPort, err := polling.Listen()
	lines.Check(err)
	lines.Check(poll.Add(web))
	lines.Check(poll.Add(echo))
	lines.Say(map[string]int{"web": webPort, "echo": echoPort})
	known := map[int]*connection{}
	buffer := make([]byte, 1<<18)
	for {
		lines.Check(poll.Each(-1, func(fd int) error {
			if fd == web || fd == echo {
				accepted, err := polling.Accept(fd)
				if err != nil {
					return err
				}
				known[accepted] = &connection{web: fd == web}
				return poll.Add(accepted)
			}
			count, err := syscall.Read(fd, buffer)
			if err == nil && count > 0 {
				err = polling.Write(fd, known[fd].answers(buffer[:count]))
			}
			if err != nil || count <= 0 {
				delete(known, fd)
				syscall.Close(fd)
			}
			return nil
		}))
	}
}
