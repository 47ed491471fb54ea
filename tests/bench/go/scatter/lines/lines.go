// Package lines speaks JSON lines with the bench: one object on stdin asks, one on stdout answers.
package lines

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log"
	"os"
)

// Say writes one object.
func Say(what any) {
	text, err := json.Marshal(what)
	Check(err)
	fmt.Println(string(text))
}

// Serve answers every line until stdin ends.
func Serve[Command any](answer func(Command) any) {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 16<<20)
	for in.Scan() {
		var command Command
		Check(json.Unmarshal(in.Bytes(), &command))
		Say(answer(command))
	}
}

// Check ends the program with what went wrong.
func Check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
