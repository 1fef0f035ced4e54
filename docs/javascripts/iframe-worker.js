// Search without a server: browsers start no Worker from file://, so a hidden frame stands in for it.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.loaded = new Promise((done) => frame.addEventListener("load", done, { once: true }));
      frame.srcdoc = `<script>postMessage = (data) => parent.postMessage(data, "*")</script>
        <script src="${new URL(url, location.href)}"></script>`;
      window.addEventListener("message", (event) => {
        if (event.source === frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      document.body.append(frame);
      this.frame = frame;
    }
    postMessage(data) {
      this.loaded.then(() =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
