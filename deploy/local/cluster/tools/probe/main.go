// What the cluster's own tests run in pods: serves its name, asks others for theirs.
//
//	probe serve                 HTTP on :8000, answers with the host name
//	probe ask SECONDS NAME...   print what each http://NAME:8000 answers, asking again until SECONDS have passed
//	probe get SECONDS URL       print the status of a GET, asking again until SECONDS have passed
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"
)

func get(url string, deadline time.Time) (int, string) {
	client := http.Client{Timeout: 2 * time.Second}
	for {
		response, err := client.Get(url)
		if err == nil {
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			return response.StatusCode, string(body)
		}
		if time.Now().After(deadline) {
			fmt.Println(err)
			os.Exit(1)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func serve() {
	name, _ := os.Hostname()
	go http.ListenAndServe(":9000", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "# TYPE probe_up gauge\nprobe_up 1")
	}))
	err := http.ListenAndServe(":8000", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, name)
	}))
	fmt.Println(err)
	os.Exit(1)
}

func main() {
	if os.Args[1] == "serve" {
		serve()
	}
	seconds, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	deadline := time.Now().Add(time.Duration(seconds) * time.Second)
	for _, target := range os.Args[3:] {
		if os.Args[1] == "ask" {
			_, body := get("http://"+target+":8000", deadline)
			fmt.Println(target, body)
		} else {
			status, _ := get(target, deadline)
			fmt.Println(status)
		}
	}
}
