package client

import (
	"testing"
	"time"
)

// fakeClock shows a deadline and the time that it reads.
func fakeClock() (*deadline, *time.Duration) {
	now := 100 * time.Second
	return newDeadline(func() time.Duration { return now }), &now
}

func expectLeft(t *testing.T, d *deadline, want time.Duration) {
	t.Helper()
	if got := d.remaining(); got != want {
		t.Errorf("%v is left, not %v", got, want)
	}
}

func TestAGrantCountsFromBeforeItsMessageWasSent(t *testing.T) {
	d, now := fakeClock()
	d.start()
	*now += 700 * time.Millisecond // the answer is late
	d.grant(0, 1800*time.Millisecond)
	expectLeft(t, d, 1100*time.Millisecond)
	first := d.beat()
	*now += 300 * time.Millisecond
	d.grant(first, 1800*time.Millisecond)
	expectLeft(t, d, 1500*time.Millisecond)
	*now += 1500 * time.Millisecond
	expectLeft(t, d, 0)
}

func TestADeadlineOnlyMovesForward(t *testing.T) {
	d, now := fakeClock()
	d.start()
	*now += time.Second
	first := d.beat()
	d.grant(first, 2*time.Second)
	d.grant(0, 2*time.Second)     // an answer to what was sent before
	d.grant(first, time.Second/2) // a shorter one
	expectLeft(t, d, 2*time.Second)
}

func TestWhatNobodySentOrAnEarlierStreamSentGrantsNothing(t *testing.T) {
	d, now := fakeClock()
	d.start()
	first := d.beat()
	d.grant(first+1, time.Hour)
	expectLeft(t, d, 0)
	d.start()
	d.grant(first, time.Hour)
	expectLeft(t, d, 0)
	*now += time.Second
	d.grant(0, 3*time.Second)
	expectLeft(t, d, 2*time.Second)
}

func TestAnotherTermBeginsWithoutTheLastOnesTime(t *testing.T) {
	d, _ := fakeClock()
	d.start()
	d.grant(0, time.Hour)
	d.reset()
	expectLeft(t, d, 0)
	d.grant(0, time.Second)
	expectLeft(t, d, time.Second)
}

func TestTheBootClockGoesOn(t *testing.T) {
	before := bootTime()
	time.Sleep(2 * time.Millisecond)
	if passed := bootTime() - before; before <= 0 || passed < 2*time.Millisecond {
		t.Errorf("it went from %v on by %v", before, passed)
	}
}
