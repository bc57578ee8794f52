// 解码参数的游乐场：读出页面上一块代码打印的“词 分数”，拖动滑条看分布怎样变
"use strict";

(() => {
  /** softmax；-Infinity 的概率为零。 */
  function softmax(logits) {
    const top = Math.max(...logits)
    const powers = logits.map((z) => Math.exp(z - top))
    const sum = powers.reduce((a, b) => a + b)
    return powers.map((p) => p / sum)
  }

  /** 温度 → top-k → top-p → min-p，次序与 minillm/decoding.py 的 Sampler 相同；砍掉的概率为零。 */
  function distribution(logits, { T = 1, k = logits.length, p = 1, minP = 0 } = {}) {
    let z = logits.map((v) => v / T)
    const cut = (keep) => { z = z.map((v, i) => (keep(v, i) ? v : -Infinity)) }
    const kth = [...z].sort((a, b) => b - a)[Math.min(k, z.length) - 1]
    cut((v) => v >= kth)
    if (p < 1) {
      const probability = softmax(z)
      const order = z.map((_, i) => i).sort((a, b) => z[b] - z[a] || a - b)
      const kept = new Set()
      let before = 0
      for (const i of order) {
        if (before < p) kept.add(i)
        before += probability[i]
      }
      cut((_, i) => kept.has(i))
    }
    const best = Math.max(...z)
    if (minP > 0) cut((v) => v >= best + Math.log(minP))
    return softmax(z)
  }

  const KNOBS = [
    { key: "T", name: "温度 T", min: 0.1, max: 3, step: 0.1, value: 1 },
    { key: "k", name: "top-k", min: 1, max: null, step: 1, value: null }, // 上限是词数，缺省不截断
    { key: "p", name: "top-p", min: 0.05, max: 1, step: 0.05, value: 1 },
    { key: "minP", name: "min-p", min: 0, max: 1, step: 0.05, value: 0 },
  ]

  function build(root) {
    const text = root.previousElementSibling?.querySelector("pre code")?.textContent ?? ""
    const rows = [...text.matchAll(/^(\S+) (-?\d+(?:\.\d+)?)$/gm)].map(([, word, score]) => [word, Number(score)])
    if (!rows.length) throw new Error("游乐场前面要有一块输出，每行是“词 分数”")
    const logits = rows.map(([, score]) => score)
    const values = {}

    const panel = document.createElement("div")
    panel.className = "zx-knobs"
    const bars = document.createElement("ul")
    bars.className = "zx-bars"
    for (const [word] of rows) {
      const item = document.createElement("li")
      item.innerHTML = `<span></span><i></i><span></span>`
      item.firstElementChild.textContent = word
      bars.append(item)
    }
    const status = document.createElement("p")
    status.className = "zx-knobs__status"
    status.setAttribute("role", "status")

    const update = () => {
      const now = distribution(logits, values)
      now.forEach((probability, i) => {
        const item = bars.children[i]
        item.children[1].style.width = `${probability * 100}%`
        item.children[2].textContent = probability ? `${(probability * 100).toFixed(1)}%` : "砍掉"
        item.classList.toggle("zx-bars--cut", !probability)
      })
      status.textContent = `留下 ${now.filter(Boolean).length} 个`
    }
    for (const knob of KNOBS) {
      const row = document.createElement("label")
      row.className = "zx-slider"
      const { key, name, min, step } = knob
      const max = knob.max ?? rows.length
      const input = Object.assign(document.createElement("input"), { type: "range", min, max, step, value: knob.value ?? max })
      input.name = key
      input.setAttribute("aria-label", name)
      const shown = document.createElement("b")
      const read = () => { shown.textContent = values[key] = Number(input.value) }
      input.addEventListener("input", () => { read(); update() })
      read()
      row.append(`${name} = `, shown, input)
      panel.append(row)
    }
    update()
    root.append(panel, bars, status)
  }

  document.querySelectorAll(".zx-decoding").forEach(build)
})()
