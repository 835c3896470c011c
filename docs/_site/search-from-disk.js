// A browser starts no worker for a page that is read from disk, so that the search would be missing: there it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      const script = inner.document.createElement("script");
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      script.src = url;
      script.onload = () => {
        this.inner = inner;
        this.waiting.splice(0).forEach(data => this.postMessage(data));
      };
      inner.document.body.append(script);
    }
    postMessage(data) {
      if (this.inner) this.inner.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
  };
}
