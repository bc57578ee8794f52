// 图：点开放大；一组“同一个量取不同值”的选项卡变成滑条。没有脚本时它们就是普通的图与选项卡
"use strict";

(() => {
  /** “s = 7.5” → ["s", "7.5"]；不是这种写法的标签为 null。 */
  function setting(label) {
    const match = /^(.{1,12}?)\s*=\s*(-?\d+(?:\.\d+)?)$/.exec(label.trim())
    return match && [match[1], match[2]]
  }

  /** 标签全是同一个量的取值、每页都有图的选项卡：在标签上方加一根滑条，与标签同步。 */
  function slide(set) {
    const labels = [...set.querySelectorAll(":scope > .tabbed-labels > label")]
    const blocks = [...set.querySelectorAll(":scope > .tabbed-content > .tabbed-block")]
    const inputs = [...set.querySelectorAll(":scope > input")]
    const settings = labels.map((label) => setting(label.textContent))
    if (labels.length < 3 || settings.some((s) => s?.[0] !== settings[0]?.[0]) || !blocks.every((b) => b.querySelector(".zx-figure"))) return

    const [name] = settings[0]
    const row = document.createElement("label")
    row.className = "zx-slider"
    const range = Object.assign(document.createElement("input"), { type: "range", min: 0, max: labels.length - 1, step: 1 })
    range.setAttribute("aria-label", name)
    const shown = document.createElement("b")
    row.append(`${name} = `, shown, range)
    set.before(row)

    const show = (i) => {
      range.value = i
      shown.textContent = settings[i][1]
      range.setAttribute("aria-valuetext", settings[i][1])
    }
    range.addEventListener("input", () => {
      inputs[range.value].checked = true
      inputs[range.value].dispatchEvent(new Event("change", { bubbles: true }))
      show(Number(range.value))
    })
    // 拖动时要马上有图：碰到滑条就把没载入的都载入
    for (const event of ["pointerenter", "focus"])
      range.addEventListener(event, () => set.querySelectorAll("img").forEach((image) => { image.loading = "eager" }), { once: true })
    inputs.forEach((input, i) => input.addEventListener("change", () => show(i)))
    show(Math.max(0, inputs.findIndex((input) => input.checked)))
  }

  /** 每张图右上角一个“放大”按钮；图本身也可以点。 */
  function zoomable(figure, dialog) {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "zx-zoom", title: "放大" })
    button.setAttribute("aria-label", "放大这张图")
    const open = () => {
      const image = [...figure.querySelectorAll("img")].find((m) => m.checkVisibility())
      if (!image) return
      dialog.querySelector("img").replaceWith(image.cloneNode())
      dialog.querySelector("img").removeAttribute("loading")
      dialog.setAttribute("aria-label", image.alt || "放大的图")
      dialog.showModal()
    }
    button.addEventListener("click", open)
    figure.querySelectorAll("img").forEach((image) => image.addEventListener("click", open))
    figure.prepend(button)
  }

  function start() {
    document.querySelectorAll(".tabbed-set").forEach(slide)
    const dialog = document.createElement("dialog")
    dialog.className = "zx-lightbox md-typeset"
    dialog.innerHTML = `<button type="button" class="zx-close" aria-label="关闭" title="关闭（Esc）">×</button><img alt="">`
    dialog.addEventListener("click", () => dialog.close()) // 点哪里都关；Esc 是 <dialog> 自带的
    document.body.append(dialog)
    document.querySelectorAll(".zx-figure").forEach((figure) => zoomable(figure, dialog))
  }

  start()
})()
