// A page that was opened from a disk may not start a worker. The search's worker then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = this.inside = frame.contentWindow;
      inside.document.open();
      inside.document.write("<html><body></body></html>");
      inside.document.close();
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      const load = address => new Promise((resolve, reject) => {
        const script = inside.document.createElement("script");
        script.src = address;
        script.onload = resolve;
        script.onerror = reject;
        inside.document.body.appendChild(script);
      });
      inside.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
      this.ready = load(new URL(url, location.href));
    }
    postMessage(data) {
      this.ready.then(() => {
        const event = new this.inside.MessageEvent("message", { data });
        this.inside.dispatchEvent(event);
      });
    }
    terminate() { this.inside.frameElement.remove(); }
  };
  window.IFrameWorker = window.Worker;  // by this name the theme's worker knows to look for languages beside itself
}

// A query asks for all of its words, not for any, each as far as it is typed. Chinese has no spaces, so the index has
// each of its characters by itself. Who writes operators (+ - " * ~ ^ :) means something else, and gets it.
window.Worker = class extends window.Worker {
  postMessage(message) {
    const QUERY = 2, simple = message.type === QUERY && !/["+*~^:]|(^|\s)-/.test(message.data);
    super.postMessage(!simple ? message : { ...message, data: message.data
      .replace(/[\u4e00-\u9fff]/g, character => ` ${character} `).split(/\s+/).filter(Boolean)
      .map(word => /[\u4e00-\u9fff]/.test(word) ? `+${word}` : `+${word}*`).join(" ") });
  }
};
