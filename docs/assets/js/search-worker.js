/* 站内搜索的 worker：替换 Material 自带的那一个，界面、高亮、分享、快捷键照旧。

   消息与 Material 相同：收 {type: 0, data: {config, docs, options}} 建索引，回 {type: 1}；
   收 {type: 2, data: "查询"}，回 {type: 3, data: {items, suggest}}。
   docs 是小节（location 带 #）与页（不带 #）；config 里另有构建时写入的
   synonyms（同义词组）与 simplified（“繁简繁简……”的字串），见 src/zhixing/search.py。

   中文按相邻两字切分，字母与数字按词；打分是 BM25F 乘覆盖率，先给小节打分再归到页。 */
"use strict"

const HAN = "\\u3400-\\u9fff\\uf900-\\ufaff"
const ALNUM = "a-z0-9\\u00df-\\u024f\\u0370-\\u03ff"
const TOKEN = new RegExp(`[${HAN}]+|[${ALNUM}]+(?:[.+#'’_-][${ALNUM}]+)*[+#]*`, "g")
const IS_HAN = new RegExp(`^[${HAN}]`)
const STARTS_ALNUM = new RegExp(`^[${ALNUM}]`)
const NOT_ALNUM = new RegExp(`[^${ALNUM}+#]+`)

const WEIGHT = { page: 6, section: 3, tags: 3, path: 3, text: 1 } // 一处命中抵正文里的几处
const K1 = 1.2 // BM25 的饱和与长度归一
const B = 0.5
const PREFIX = 0.6 // 只对上词的开头：正在输入的词
const TYPO = 0.5 // 差一个字母
const MAX_WRITINGS = 12 // 一句查询最多换成几种说法
const APART = 0.4 // 字都有，但没有连在一起
const MAX_EXPANSIONS = 20
const MAX_PAGES = 30
const SECTIONS = 6 // 每页最多列几个小节

let simplified = new Map()
let traditional = /(?!)/g // simplified 里的字，一个也没有时什么都不匹配

function setSimplified(pairs) {
  simplified = new Map()
  for (let i = 0; i < pairs.length; i += 2) simplified.set(pairs[i], pairs[i + 1])
  traditional = simplified.size ? new RegExp(`[${[...simplified.keys()].join("")}]`, "g") : /(?!)/g
}

/** 归一化成搜索用的样子：全角转半角、小写、繁转简。不改变长度，标出命中时才能对回原文。 */
function fold(text) {
  const half = text.replace(/[\uff01-\uff5e]/g, (char) => String.fromCharCode(char.charCodeAt(0) - 0xfee0))
  const lower = half.toLowerCase()
  const same = lower.length === text.length ? lower : half.replace(/[A-Z]/g, (char) => char.toLowerCase())
  return same.replace(traditional, (char) => simplified.get(char))
}

/** 索引里的 HTML 片段 → 纯文字。 */
function plain(html) {
  const entities = { lt: "<", gt: ">", amp: "&", quot: '"', "#39": "'" }
  return html
    .replace(/<[^>]+>/g, " ")
    .replace(/&(lt|gt|amp|quot|#39);/g, (_, name) => entities[name])
    .replace(/\s+/g, " ")
    .trim()
}

/** 一段连续汉字 → 相邻两字；单字就是它自己。 */
function bigrams(run) {
  if (run.length === 1) return [run]
  return Array.from({ length: run.length - 1 }, (_, i) => run.slice(i, i + 2))
}

/** 一个词 → 索引里的词：ip-adapter 拆成 ip、adapter，另记连写的 ipadapter。 */
function words(token) {
  const parts = token.split(NOT_ALNUM).filter(Boolean)
  return parts.length > 1 ? [parts.join(""), ...parts] : parts
}

/** 归一化的文字 → 索引用的词元。 */
function tokens(folded) {
  return (folded.match(TOKEN) ?? []).flatMap((token) => (IS_HAN.test(token) ? bigrams(token) : words(token)))
}

/** 编辑距离（相邻互换算一次）是不是恰好为 1。 */
function oneEdit(a, b) {
  if (a === b || Math.abs(a.length - b.length) > 1) return false
  let i = 0
  while (i < a.length && a[i] === b[i]) i++
  const rest = (x, y) => x === y
  return (
    rest(a.slice(i + 1), b.slice(i + 1)) || // 替换
    rest(a.slice(i + 1), b.slice(i)) || // 多一个
    rest(a.slice(i), b.slice(i + 1)) || // 少一个
    (a[i] === b[i + 1] && a[i + 1] === b[i] && rest(a.slice(i + 2), b.slice(i + 2)))
  )
}

class Index {
  constructor({ config = {}, docs }) {
    setSimplified(config.simplified ?? "")
    this.synonyms = (config.synonyms ?? []).map((group) => group.map(fold))
    this.docs = []
    this.pages = new Map() // 页的网址 -> 这一页自己的序号
    this.postings = new Map() // 词元 -> [序号, 加权词频, 序号, 加权词频……]
    for (const doc of docs) this.add(doc)
    const average = this.docs.reduce((sum, doc) => sum + doc.length, 0) / (this.docs.length || 1)
    this.norm = Float64Array.from(this.docs, (doc) => K1 * (1 - B + (B * doc.length) / average))
    const zeros = () => new Float64Array(this.docs.length)
    this.scratch = { sum: zeros(), covered: zeros(), best: zeros(), bestIdf: zeros() } // 每次查询用完都归零
    this.vocabulary = [...this.postings.keys()].filter((token) => !IS_HAN.test(token)).sort()
  }

  add({ location, title, text, tags = [], boost = 1 }) {
    const [page, anchor] = location.split("#")
    const id = this.docs.length
    const doc = { location, page, tags, boost, title: plain(title), text: plain(text) }
    doc.foldedTitle = fold(doc.title)
    doc.foldedText = fold(doc.text)
    doc.folded = `${doc.foldedTitle}\n${doc.foldedText}\n${fold(tags.join("\n"))}`
    if (anchor === undefined) this.pages.set(page, id)
    const counts = new Map()
    doc.length = 0
    const count = (folded, weight) => {
      for (const token of tokens(folded)) {
        counts.set(token, (counts.get(token) ?? 0) + weight)
        doc.length++
      }
    }
    count(doc.foldedTitle, anchor === undefined ? WEIGHT.page : WEIGHT.section)
    count(doc.foldedText, WEIGHT.text)
    if (anchor === undefined) {
      for (const tag of tags) count(fold(tag), WEIGHT.tags)
      count(fold(page.replace(/\.html$/, "").replaceAll("/", " ")), WEIGHT.path)
    }
    for (const [token, frequency] of counts) {
      const list = this.postings.get(token)
      if (list) list.push(id, frequency)
      else this.postings.set(token, [id, frequency])
    }
    this.docs.push(doc)
  }

  /** 词表里以 prefix 开头的词。 */
  startingWith(prefix) {
    let low = 0
    let high = this.vocabulary.length
    while (low < high) {
      const middle = (low + high) >> 1
      if (this.vocabulary[middle] < prefix) low = middle + 1
      else high = middle
    }
    const found = []
    while (found.length < MAX_EXPANSIONS && this.vocabulary[low]?.startsWith(prefix)) found.push(this.vocabulary[low++])
    return found
  }

  /** 查询词 → [索引里的词, 权重]：本身、以它开头的；都没有就找差一个字母的。 */
  expand(word) {
    if (word.length === 1) return [[word, 1]]
    const found = this.startingWith(word).map((token) => [token, token === word ? 1 : PREFIX])
    if (found.length || word.length < 4) return found
    return this.vocabulary.filter((token) => oneEdit(word, token)).slice(0, MAX_EXPANSIONS).map((token) => [token, TYPO])
  }

  /** 含有这个汉字的小节：单字不进索引，现找。 */
  containing(char) {
    const list = []
    this.docs.forEach((doc, id) => doc.folded.includes(char) && list.push(id, doc.foldedTitle.includes(char) ? WEIGHT.section : 1))
    return list
  }

  /** 一个查询词在各小节的得分，[[序号, 分], …]。 */
  scoreTerm(term) {
    const han = IS_HAN.test(term)
    // 每一组里任一个对上就算这一组对上：汉字每两字一组，字母整个词一组
    const groups = han ? bigrams(term).map((gram) => [[gram, 1]]) : [this.expand(term)]
    const { sum, covered, best, bestIdf } = this.scratch
    const touched = []
    let total = 0
    for (const group of groups) {
      const here = []
      let rarest = 0
      for (const [token, weight] of group) {
        const list = token.length === 1 && han ? this.containing(token) : this.postings.get(token)
        if (!list?.length) continue
        const df = list.length / 2
        const idf = Math.log(1 + (this.docs.length - df + 0.5) / (df + 0.5))
        rarest = Math.max(rarest, idf)
        for (let k = 0; k < list.length; k += 2) {
          const id = list[k]
          const score = (weight * idf * list[k + 1] * (K1 + 1)) / (list[k + 1] + this.norm[id])
          if (score <= best[id]) continue
          if (!best[id]) here.push(id)
          best[id] = score
          bestIdf[id] = idf
        }
      }
      total += rarest // 全站都没有的两字组合（词与词的接缝）不算没覆盖到
      for (const id of here) {
        if (!sum[id]) touched.push(id)
        sum[id] += best[id]
        covered[id] += bestIdf[id]
        best[id] = 0
      }
    }
    return touched.map((id) => {
      const coverage = Math.min(1, covered[id] / total)
      let score = sum[id] * coverage * coverage
      sum[id] = covered[id] = 0
      const doc = this.docs[id]
      if (han && term.length > 2) {
        const whole = coverage > 0.999 && doc.folded.includes(term)
        score *= whole ? (doc.foldedTitle.includes(term) ? 2 : 1.5) : APART
      } else if (locate(doc.foldedTitle, term) >= 0) score *= doc.location.includes("#") ? 1.5 : 2.5
      return [id, score]
    })
  }

  /** 同一句查询的几种写法，各是词的数组：连写与分写、同义词。同义词与原词一样算。 */
  variants(query) {
    const seen = new Map()
    const add = (text) => {
      const terms = (text.match(TOKEN) ?? []).flatMap((token) => (IS_HAN.test(token) ? [token] : token.split(NOT_ALNUM).filter(Boolean)))
      if (terms.length) seen.set(terms.join(" "), terms)
    }
    const writings = [query]
    for (const group of this.synonyms)
      for (const phrase of group)
        if (mentions(query, phrase))
          for (const other of group) if (other !== phrase) writings.push(query.replace(phrase, ` ${other} `))
    for (const text of writings.slice(0, MAX_WRITINGS)) {
      add(text)
      const terms = text.match(TOKEN) ?? []
      terms.forEach((term, i) => {
        const swap = (count, by) => add([...terms.slice(0, i), by, ...terms.slice(i + count)].join(" "))
        if (IS_HAN.test(term)) return
        const joined = term.split(NOT_ALNUM).join("")
        if (joined !== term && this.postings.has(joined)) swap(1, joined) // ip-adapter → ipadapter
        const next = terms[i + 1]
        if (next && !IS_HAN.test(next) && this.postings.has(joined + next)) swap(2, joined + next) // ip adapter → ipadapter
        if (this.postings.has(joined)) return
        for (let cut = 2; cut <= joined.length - 2; cut++) // ipadapter → ip adapter
          if (this.postings.has(joined.slice(0, cut)) && this.postings.has(joined.slice(cut))) swap(1, `${joined.slice(0, cut)} ${joined.slice(cut)}`)
      })
    }
    return [...seen.values()]
  }

  /** 各小节的最高分与用的写法，Map(序号 -> [分, 词的数组])。 */
  score(query) {
    const best = new Map()
    const memory = new Map()
    for (const terms of this.variants(query)) {
      const sums = new Map()
      const distinct = new Set(terms)
      for (const term of distinct) {
        if (!memory.has(term)) memory.set(term, this.scoreTerm(term))
        for (const [id, score] of memory.get(term)) {
          const entry = sums.get(id)
          if (entry) {
            entry[0] += score
            entry[1]++
          } else sums.set(id, [score, 1])
        }
      }
      for (const [id, [sum, matched]] of sums) {
        const share = matched / distinct.size
        const score = sum * share * share * this.docs[id].boost
        if (score > (best.get(id)?.[0] ?? 0)) best.set(id, [score, terms])
      }
    }
    return best
  }

  search(raw) {
    const query = fold(raw).trim()
    if (!query.match(TOKEN)) return NOTHING
    let scores = this.score(query)
    const near = !scores.size
    if (near) scores = this.score([...query].filter((char) => IS_HAN.test(char)).join(" ")) // 一个两字组合都没有：按单字找相近的
    const pages = new Map()
    for (const [id, [score, terms]] of scores) {
      const { page } = this.docs[id]
      if (!pages.has(page)) pages.set(page, [])
      pages.get(page).push({ id, score, terms })
    }
    const ranked = [...pages.entries()].map(([page, hits]) => {
      hits.sort((a, b) => b.score - a.score || a.id - b.id)
      const rest = hits.slice(1, 4).reduce((sum, hit) => sum + hit.score, 0)
      return { page, hits, score: hits[0].score + 0.2 * rest }
    })
    ranked.sort((a, b) => b.score - a.score || a.hits[0].id - b.hits[0].id)
    const asked = query.match(TOKEN)
    const floor = (ranked[0]?.score ?? 0) * 0.05
    const items = ranked
      .filter(({ score }, rank) => score >= floor && rank < (near ? 5 : MAX_PAGES))
      .map(({ page, hits }) => {
        const listed = hits.slice(0, SECTIONS)
        const own = this.pages.get(page)
        // 界面要求每组都有这一页本身
        if (own !== undefined && !listed.some((hit) => hit.id === own)) listed.push({ id: own, score: 0, terms: listed[0].terms })
        return listed.map((hit) => this.present(hit, asked, near ? query : null))
      })
    return { items, suggest: this.suggest(query) }
  }

  /** 一条结果。asked 是读者打的词（用同义词找到时也标出来）；missing 是全站都没有的原查询，界面会标成“缺少”。 */
  present({ id, score, terms }, asked, missing) {
    const doc = this.docs[id]
    const found = new Map(terms.map((term) => [term, this.pieces(term, doc.folded)]))
    const marks = [...new Set([...found.values(), asked.filter((term) => locate(doc.folded, term) >= 0)].flat())]
    marks.sort((a, b) => b.length - a.length)
    const status = {}
    if (missing) status[missing] = false
    else
      for (const [term, parts] of found) {
        if (!parts.length) status[term] = false
        for (const part of parts) status[part] = true
      }
    return {
      location: doc.location,
      title: mark(doc.title, spans(doc.foldedTitle, marks)),
      text: excerpt(doc.text, spans(doc.foldedText, marks)),
      ...(doc.tags.length && { tags: doc.tags }),
      score,
      terms: status,
    }
  }

  /** 查询词在文中出现的样子：整个；汉字不成整个就从左到右取最长的几段，字母词取差一个字母的。 */
  pieces(term, folded) {
    if (locate(folded, term) >= 0) return [term]
    if (!IS_HAN.test(term)) return this.expand(term).map(([token]) => token).filter((token) => locate(folded, token) >= 0).slice(0, 1)
    const found = []
    for (let i = 0; i < term.length - 1; ) {
      let end = term.length
      while (end - i >= 2 && !folded.includes(term.slice(i, end))) end--
      if (end - i >= 2) found.push(term.slice(i, end))
      i = Math.max(end, i + 1)
    }
    return found
  }

  /** 补全正在输入的最后一个词。 */
  suggest(query) {
    const last = query.match(/\S+$/)?.[0] ?? ""
    if (last.length < 2) return []
    const tail = last.match(TOKEN)?.at(-1) ?? ""
    let best = ""
    if (IS_HAN.test(tail)) {
      for (const id of this.pages.values()) {
        const run = this.docs[id].foldedTitle.match(new RegExp(`${tail}[${HAN}]+`))?.[0] ?? ""
        if (run.length > tail.length && (!best || run.length < best.length)) best = run
      }
    } else if (tail) {
      const size = (token) => this.postings.get(token).length
      best = this.startingWith(tail).filter((token) => token !== tail).sort((a, b) => size(b) - size(a))[0] ?? ""
    }
    return best && last.endsWith(tail) ? [last.slice(0, last.length - tail.length) + best] : []
  }
}

/** 查询里有没有这个说法；字母词要整词。 */
function mentions(query, phrase) {
  const at = query.indexOf(phrase)
  if (at < 0) return false
  const joined = (a, b) => STARTS_ALNUM.test(a ?? "") && STARTS_ALNUM.test(b ?? "")
  return !joined(query[at - 1], phrase[0]) && !joined(phrase.at(-1), query[at + phrase.length])
}

/** word 在 folded 里从 from 起第一次出现的位置；字母词要从词首算起，clip 里没有 ip。 */
function locate(folded, word, from = 0) {
  let at = folded.indexOf(word, from)
  if (!STARTS_ALNUM.test(word)) return at
  while (at > 0 && STARTS_ALNUM.test(folded[at - 1])) at = folded.indexOf(word, at + 1)
  return at
}

const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")

/** 文中各处命中的 [起, 止)，不重叠；folded 是归一化之后的文字，与原文等长。 */
function spans(folded, marks) {
  const found = []
  for (const word of marks)
    for (let at = locate(folded, word); at >= 0; at = locate(folded, word, at + word.length)) found.push([at, at + word.length])
  found.sort((a, b) => a[0] - b[0] || b[1] - a[1])
  let end = 0
  return found.filter(([from, to]) => from >= end && (end = to))
}

function mark(text, found, from = 0, to = text.length) {
  let html = ""
  let at = from
  for (const [start, end] of found) {
    if (start < at || end > to) continue
    html += `${escape(text.slice(at, start))}<mark data-md-highlight>${escape(text.slice(start, end))}</mark>`
    at = end
  }
  return html + escape(text.slice(at, to))
}

/** 命中最密的一段。 */
function excerpt(text, found, size = 160) {
  if (text.length <= size) return mark(text, found)
  let best = 0
  let most = 0
  let last = 0 // 以第 i 处开头的窗口，末尾到第 last 处
  found.forEach(([start], i) => {
    while (last < found.length && found[last][1] <= start + size - 40) last++
    if (last - i > most) [most, best] = [last - i, start]
  })
  const from = Math.max(0, Math.min(best - 30, text.length - size))
  return `${from ? "…" : ""}${mark(text, found, from, from + size)}${from + size < text.length ? "…" : ""}`
}

const NOTHING = { items: [], suggest: [] }
let source = null // 页面交来的：整个索引，或只说了索引在哪里
let index = null // 装好的索引（Promise）

/** 装索引，只装一次；线上的索引有几百 KB，等读者真的要搜才取。取不到时下一次查询再试。 */
function load() {
  index ??= (source.config.more ? fetchIndex(new URL(`../../search/${source.config.more}`, location)) : Promise.resolve(source))
    .then((data) => new Index(data))
    .catch((error) => { index = null; throw error })
  return index
}

async function fetchIndex(url) {
  const response = await fetch(url)
  if (!response.ok) throw new Error(`取不到搜索索引：${response.status} ${url}`)
  return response.json()
}

globalThis.addEventListener?.("message", async ({ data: { type, data } }) => {
  if (type === 0) {
    source = data
    index = null
    if (!source.config.more) await load()
    postMessage({ type: 1 })
  } else if (type === 2) postMessage({ type: 3, data: data.trim() ? (await load()).search(data) : NOTHING }) // 界面一上来就问一次空的
})

// 光标一进搜索框页面就说一声（page.js），打字时索引多半已经到了
if (globalThis.BroadcastChannel) new BroadcastChannel("zhixing-search").onmessage = () => source && load()
