// Browsers start no web worker on a page that was opened from disk. The search of the site is one: here its script runs
// in a hidden frame, with the events of a worker.
if (location.protocol === "file:") {
  class FrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.deliver = data => this.waiting.push(data)
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.title = "Search"
      frame.addEventListener("load", () => this.start(frame.contentWindow, url), { once: true })
      document.body.append(frame)
    }

    start(inner, url) {
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inner.document.createElement("script")
      script.src = url
      script.addEventListener("load", () => {
        this.deliver = data => inner.dispatchEvent(new inner.MessageEvent("message", { data }))
        this.waiting.splice(0).forEach(this.deliver)
      })
      inner.document.body.append(script)
    }

    postMessage(data) {
      this.deliver(data)
    }
  }

  window.Worker = FrameWorker
}
