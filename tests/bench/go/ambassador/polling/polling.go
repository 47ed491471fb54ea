// Package polling serves sockets from one thread: two system calls for each message and no goroutine, so that little of the
// core it has to share is spent on it.
package polling

import (
	"fmt"
	"net"
	"syscall"
)

// Poll waits for sockets.
type Poll struct {
	fd     int
	events [512]syscall.EpollEvent
}

// New makes one.
func New() (*Poll, error) {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	return &Poll{fd: fd}, err
}

// Add has it wait for what can be read of a socket, too.
func (p *Poll) Add(fd int) error {
	return syscall.EpollCtl(p.fd, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(fd)})
}

// Each calls back for every socket that can be read, once; it waits for the first so many milliseconds at most.
func (p *Poll) Each(milliseconds int, readable func(fd int) error) error {
	count, err := syscall.EpollWait(p.fd, p.events[:], milliseconds)
	if err != nil && err != syscall.EINTR {
		return err
	}
	for _, event := range p.events[:max(count, 0)] {
		if err := readable(int(event.Fd)); err != nil {
			return err
		}
	}
	return nil
}

// Close ends it.
func (p *Poll) Close() { syscall.Close(p.fd) }

// Listen gives a socket of loopback that accepts, and its port.
func Listen() (fd, port int, err error) {
	if fd, err = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0); err != nil {
		return
	}
	if err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		return
	}
	return fd, name.(*syscall.SockaddrInet4).Port, syscall.Listen(fd, 1024)
}

// Accept takes the next connection.
func Accept(listener int) (int, error) {
	fd, _, err := syscall.Accept4(listener, syscall.SOCK_CLOEXEC)
	if err != nil {
		return 0, err
	}
	return fd, undelayed(fd)
}

// Dial connects to IP:PORT.
func Dial(address string) (int, error) {
	to, err := net.ResolveTCPAddr("tcp4", address)
	if err != nil {
		return 0, err
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err := syscall.Connect(fd, &syscall.SockaddrInet4{Port: to.Port, Addr: [4]byte(to.IP.To4())}); err != nil {
		return 0, fmt.Errorf("cannot dial %s: %w", address, err)
	}
	return fd, undelayed(fd)
}

func undelayed(fd int) error {
	return syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
}

// Write sends all of it; a socket that takes no more is waited for.
func Write(fd int, data []byte) error {
	for len(data) > 0 {
		count, err := syscall.Write(fd, data)
		if err != nil {
			return err
		}
		data = data[count:]
	}
	return nil
}
