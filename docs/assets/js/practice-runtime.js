/* 浏览器里的 Python：下载 Pyodide，在 Worker 里判题，停得住。
 *
 * 资源全部来自本站。Pyodide 的四个文件构建时各自 gzip 好，这里取回、解压，整个交给 Worker，
 * 所以只下载一次：停掉 Worker 再起一个也不用联网。
 * 用 file:// 打开的离线包里 fetch 与 new Worker(文件) 都被浏览器禁止，于是
 *   - 资源另有一种写法：一个 .js，调用 zhixing.receive(名字, base64)；
 *   - Worker 由下面 inWorker 这个函数的源码做成 Blob 启动。
 */
"use strict";

window.zhixing = window.zhixing || {};

/** Worker 里的全部代码。它被转成文字，不能用外面的任何变量。 */
zhixing.inWorker = function () {
  const MAX_OUTPUT = 20000; // 读者打印的内容最多传回这么多字
  let judge = null;
  let sent = 0;

  /** Pyodide 会向 fetch 要文件，从手里的这些给它。 */
  function serve(files) {
    self.fetch = async (address) => {
      const name = String(address).split("/").pop();
      if (!(name in files)) throw new TypeError(`练习里不能联网：${address}`);
      const type = name.endsWith(".wasm") ? "application/wasm" : "application/octet-stream";
      return new Response(files[name], { headers: { "content-type": type } });
    };
  }

  function importModule(source) {
    return import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  }

  function print(text) {
    if (sent > MAX_OUTPUT) return;
    sent += text.length + 1;
    self.postMessage({ type: "output", text: sent > MAX_OUTPUT ? "……（输出太多，后面的不显示）\n" : text + "\n" });
  }

  async function start({ files, lock, judgeSource }) {
    // file:// 下起不了模块 Worker，而 Pyodide 拒绝经典 Worker，因为经典 Worker 多半不能动态 import；
    // 这里能。照模块 Worker 的样子让 importScripts 抛错，它就照模块的办法加载。
    self.importScripts = () => {
      throw new TypeError("这里不用 importScripts");
    };
    serve(files);
    const { loadPyodide } = await importModule(files["pyodide.mjs"]);
    const { default: createPyodideModule } = await importModule(files["pyodide.asm.mjs"]);
    const python = await loadPyodide({
      createPyodideModule,
      indexURL: "https://pyodide.invalid/", // 只是个名字：上面的 fetch 不联网
      lockFileContents: lock,
      stdout: print,
      stderr: print,
    });
    const namespace = python.runPython("{'__name__': 'judge'}");
    python.runPython(judgeSource, { globals: namespace });
    judge = python.runPython("lambda *a: __import__('json').dumps(judge(*a))", { globals: namespace });
  }

  self.onmessage = async ({ data }) => {
    try {
      if (data.type === "start") {
        await start(data);
        self.postMessage({ type: "ready" });
      } else {
        sent = 0;
        self.postMessage({ type: "result", result: JSON.parse(judge(data.code, data.tests, data.entry)) });
      }
    } catch (error) {
      self.postMessage({ type: "crash", message: String(error).slice(0, 500) });
    }
  };
};

/** 停下来的原因：stopped 读者按了停止，late 超时，crashed 崩溃，download 下载失败，start 启动不了。 */
zhixing.Interrupted = class extends Error {
  constructor(reason, message = "") {
    super(message);
    this.reason = reason;
  }
};

zhixing.Runtime = class extends EventTarget {
  /** @param {object} settings 构建时写进页面的设置：files、bytes、lock、judge */
  constructor(settings) {
    super();
    this.settings = settings;
    this.files = null;
    this.worker = null;
    this.busy = false;
    this.cancel = () => {};
  }

  /**
   * 判一次题。
   * @param {{code: string, tests: string, entry: string}} job
   * @param {number} seconds 限时，从 Python 启动好之后算起
   * @param {{stage: Function, progress: Function, output: Function}} tell 进展
   * @throws {zhixing.Interrupted}
   */
  async run(job, seconds, tell) {
    this._setBusy(true);
    try {
      if (!this.files) {
        tell.stage("download");
        this.files = await this._download(tell.progress);
      }
      if (!this.worker) {
        tell.stage("start");
        await this._start();
      }
      tell.stage("run");
      return await this._ask({ type: "judge", ...job }, seconds, tell.output);
    } finally {
      this.cancel = () => {};
      this._setBusy(false);
    }
  }

  /** 立刻停下：下载中就放弃下载，运行中就结束 Worker（下次运行重新起一个）。 */
  stop() {
    this.cancel(new zhixing.Interrupted("stopped"));
  }

  _setBusy(busy) {
    this.busy = busy;
    this.dispatchEvent(new Event("change"));
  }

  // ---- 下载 ----

  async _download(progress) {
    const aborter = new AbortController();
    this.cancel = (error) => aborter.abort(error);
    let done = 0;
    const count = (n) => progress(Math.min(1, (done += n) / this.settings.bytes));
    try {
      const pairs = Object.entries(this.settings.files).map(async ([name, url]) => {
        const packed = url.endsWith(".js") ? await this._viaScript(name, url, count) : await this._viaFetch(url, count, aborter.signal);
        return [name, await this._unzip(packed)];
      });
      const found = Promise.all(pairs);
      const aborted = new Promise((_, reject) => aborter.signal.addEventListener("abort", () => reject(aborter.signal.reason)));
      return Object.fromEntries(await Promise.race([found, aborted]));
    } catch (error) {
      aborter.abort(error);
      throw error instanceof zhixing.Interrupted ? error : new zhixing.Interrupted("download", String(error.message || error));
    }
  }

  async _viaFetch(url, count, signal) {
    const response = await fetch(url, { signal });
    if (!response.ok) throw new Error(`${response.status} ${url}`);
    const chunks = [];
    const reader = response.body.getReader();
    for (let step; !(step = await reader.read()).done; count(step.value.length)) chunks.push(step.value);
    return new Blob(chunks);
  }

  _viaScript(name, url, count) {
    return new Promise((resolve, reject) => {
      zhixing.receive = zhixing.receive || ((which, text) => zhixing.receive.waiting[which](text));
      zhixing.receive.waiting = zhixing.receive.waiting || {};
      const script = document.createElement("script");
      zhixing.receive.waiting[name] = (text) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        count(bytes.length);
        resolve(new Blob([bytes]));
        script.remove();
      };
      script.onerror = () => reject(new Error(`读不到 ${url}`));
      script.src = url;
      document.head.append(script);
    });
  }

  /** 有的服务器会声明 Content-Encoding: gzip，浏览器就已经解开了：看开头两个字节。 */
  async _unzip(blob) {
    const [a, b] = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
    if (a !== 0x1f || b !== 0x8b) return blob.arrayBuffer();
    return new Response(blob.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  }

  // ---- Worker ----

  async _start() {
    const source = new Blob([`(${zhixing.inWorker})()`], { type: "text/javascript" });
    const url = URL.createObjectURL(source);
    this.worker = new zhixing.Worker(url); // 真的 Worker（见 overrides/main.html）
    const { lock, judge } = this.settings;
    try {
      await this._ask({ type: "start", files: this.files, lock, judgeSource: judge }, 120);
    } catch (error) {
      throw error.reason === "stopped" ? error : new zhixing.Interrupted("start", error.message || "超过 120 秒");
    } finally {
      URL.revokeObjectURL(url);
    }
  }

  /** 发一条消息，等到结果、超时、崩溃或被取消；后三种都结束 Worker。 */
  _ask(message, seconds, output = () => {}) {
    const worker = this.worker;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => this.cancel(new zhixing.Interrupted("late")), seconds * 1000);
      this.cancel = (error) => {
        clearTimeout(timer);
        worker.terminate();
        this.worker = null;
        reject(error);
      };
      worker.onerror = (event) => this.cancel(new zhixing.Interrupted("crashed", event.message || ""));
      worker.onmessage = ({ data }) => {
        if (data.type === "output") output(data.text);
        else if (data.type === "crash") this.cancel(new zhixing.Interrupted("crashed", data.message));
        else {
          clearTimeout(timer);
          resolve(data.result);
        }
      };
      worker.postMessage(message);
    });
  }
};
