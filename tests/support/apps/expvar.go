// A Go program that publishes what it counts by expvar.
package main

import (
	"expvar"
	"fmt"
	"net/http"
	"os"
)

var requests = expvar.NewInt("requests")

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		fmt.Fprintln(w, "hello")
	})
	if err := http.ListenAndServe(os.Args[1], nil); err != nil {
		panic(err)
	}
}
