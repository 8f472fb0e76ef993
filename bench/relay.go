// What one would write for speed: a relay on Go's net/http that waits for Segment.
package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
)

func main() {
	key := os.Getenv("SEGMENT_WRITE_KEY")
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 4096}}

	http.HandleFunc("/webhook", func(w http.ResponseWriter, r *http.Request) {
		var event map[string]any
		if err := json.NewDecoder(r.Body).Decode(&event); err != nil {
			w.WriteHeader(400)
			return
		}
		data, _ := event["data"].(map[string]any)
		name, _ := event["event_type"].(string)
		call := map[string]any{
			"type":       "track",
			"userId":     data["customer_id"],
			"event":      "customerio:" + name,
			"properties": data,
			"context":    map[string]any{"event_id": event["event_id"]},
			"messageId":  event["event_id"],
		}
		body, _ := json.Marshal(map[string]any{"batch": []any{call}, "writeKey": key})
		upload, _ := http.NewRequest("POST", os.Getenv("SEGMENT_HOST")+"/v1/batch", bytes.NewReader(body))
		upload.Header.Set("Content-Type", "application/json")
		upload.SetBasicAuth(key, "")
		answer, err := client.Do(upload)
		if err != nil {
			w.WriteHeader(503)
			return
		}
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		if answer.StatusCode != 200 {
			w.WriteHeader(503)
		}
		w.Write([]byte(`{"status":"delivered"}`))
	})
	http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil)
}
