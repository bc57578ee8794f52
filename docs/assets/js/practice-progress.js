/* 练习的草稿与进度：只存在读者自己的浏览器里。
 *
 * 一道练习一个键，形如 zhixing:practice:lc-209/sliding_window，值是
 * { code: 草稿, passed: 第一次通过的时刻 }。浏览器不让存（无痕模式、空间满）时当作没存过。
 * 题目索引里带 data-practice 的标记在这里点亮。
 */
"use strict";

window.zhixing = window.zhixing || {};

zhixing.progress = {
  PREFIX: "zhixing:practice:",

  load(key) {
    try {
      return JSON.parse(localStorage.getItem(this.PREFIX + key)) || {};
    } catch {
      return {};
    }
  },

  /** 合并进已有的记录；值为 undefined 的字段删掉。返回存没存成。 */
  save(key, changes) {
    const record = Object.assign(this.load(key), changes);
    try {
      if (Object.values(record).every((value) => value === undefined)) localStorage.removeItem(this.PREFIX + key);
      else localStorage.setItem(this.PREFIX + key, JSON.stringify(record));
      return true;
    } catch {
      return false;
    }
  },

  /** 题目索引：一页的练习全通过了就打勾，通过一部分就写几分之几。 */
  paintMarks() {
    for (const mark of document.querySelectorAll("[data-practice]")) {
      const keys = mark.dataset.practice.split(" ");
      const passed = keys.filter((key) => this.load(key).passed).length;
      mark.classList.toggle("zx-mark--done", passed === keys.length);
      if (passed === keys.length) mark.textContent = "✓ 练习已通过";
      else mark.textContent = passed ? `练习 ${passed}/${keys.length}` : "练习";
    }
  },
};

zhixing.progress.paintMarks();
// 在别的标签页里通过了，或从那一页后退回来
addEventListener("storage", () => zhixing.progress.paintMarks());
addEventListener("pageshow", () => zhixing.progress.paintMarks());
