/* 站内搜索的 worker：替换 Material 自带的那一个，界面、高亮、分享、快捷键照旧。

   消息与 Material 相同：收 {type: 0, data: {config, docs, options}} 建索引，回 {type: 1}；
   收 {type: 2, data: "查询"}，回 {type: 3, data: {items, suggest}}。
   docs 是小节（location 带 #）与页（不带 #），title 与 text 是纯文字；config 里另有构建时写入的
   synonyms（同义词组）与 simplified（“繁简繁简……”的字串），见 src/zhixing/search.py。

   中文按相邻两字切分，字母与数字按词；打分是 BM25F 乘覆盖率，先给小节打分再归到页。
   倒排表是定长数组：一个词元在哪些小节、各贡献多少分，建索引时就算好；查询只做加法，
   摘要与高亮只给列出来的几十页做。 */
"use strict"

const HAN = "\\u3400-\\u9fff\\uf900-\\ufaff"
const ALNUM = "a-z0-9\\u00df-\\u024f\\u0370-\\u03ff"
const WORD = `[${ALNUM}]+(?:[.+#'’_-][${ALNUM}]+)*[+#]*`
const TOKEN = new RegExp(`[${HAN}]+|${WORD}`, "g")
const WORDS = new RegExp(WORD, "g")
const NOT_ALNUM = new RegExp(`[^${ALNUM}+#]+`)

const WEIGHT = { page: 6, section: 3, tags: 3, path: 3, text: 1 } // 一处命中抵正文里的几处
const K1 = 1.2 // BM25 的饱和与长度归一
const B = 0.5
const PREFIX = 0.6 // 只对上词的开头：正在输入的词
const TYPO = 0.5 // 差一个字母
const MAX_WRITINGS = 12 // 一句查询最多换成几种说法
const APART = 0.4 // 字都有，但没有连在一起
const NAMED = 1.5 // 查询就是页名：标题冒号前的一截，或网址的最后一段
const SINGLE = 0.1 // 夹在别的词之间的单字（和、与、的）有没有都差不多
const MAX_EXPANSIONS = 20
const MAX_PAGES = 30
const SECTIONS = 6 // 每页最多列几个小节
const WARM_UP = 5 // 装好索引之后先自问几条

let simplified = new Map() // 逐字换：繁体 → 简体，全角 → 半角
let changed = /(?!)/g // 要换的字

function setSimplified(pairs) {
  simplified = new Map()
  for (let i = 0; i < pairs.length; i += 2) simplified.set(pairs[i], pairs[i + 1])
  for (let code = 0xff01; code <= 0xff5e; code++) {
    const half = String.fromCharCode(code - 0xfee0).toLowerCase()
    if (/[a-z0-9.+#'_-]/.test(half)) simplified.set(String.fromCharCode(code), half) // 全角的标点不进词，不必换
  }
  changed = new RegExp(`[${[...simplified.keys()].join("")}]`, "g")
}

/** 归一化成搜索用的样子：小写、全角转半角、繁转简。不改变长度，标出命中时才能对回原文。 */
function fold(text) {
  const lower = text.toLowerCase()
  const same = lower.length === text.length ? lower : text.replace(/[A-Z]/g, (char) => char.toLowerCase())
  return same.replace(changed, (char) => simplified.get(char))
}

const han = (code) => (code >= 0x3400 && code <= 0x9fff) || (code >= 0xf900 && code <= 0xfaff)
const isHan = (term) => han(term.charCodeAt(0))
const alnum = (code) =>
  (code >= 0x61 && code <= 0x7a) || (code >= 0x30 && code <= 0x39) || (code >= 0xdf && code <= 0x24f) || (code >= 0x370 && code <= 0x3ff)

/** 一个词 → 索引里的词：ip-adapter 拆成 ip、adapter，另记连写的 ipadapter。 */
function words(token) {
  const parts = token.split(NOT_ALNUM).filter(Boolean)
  return parts.length > 1 ? [parts.join(""), ...parts] : parts
}

/** 归一化的查询 → 各个词：汉字一段一个，字母词在连字符处断开。 */
const split = (folded) => (folded.match(TOKEN) ?? []).flatMap((token) => (isHan(token) ? [token] : token.split(NOT_ALNUM).filter(Boolean)))

/** 编辑距离（相邻互换算一次）是不是恰好为 1。 */
function oneEdit(a, b) {
  if (Math.abs(a.length - b.length) > 1) return false
  if (a.length > b.length) [a, b] = [b, a]
  let head = 0
  while (head < a.length && a[head] === b[head]) head++
  let tail = 0
  while (tail < a.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++
  const left = a.length - head - tail // 去掉相同的头尾，短的一边还剩几个
  if (left === 0) return b.length > a.length // 少一个
  if (a.length < b.length) return false
  return left === 1 || (left === 2 && a[head] === b[head + 1] && a[head + 1] === b[head]) // 替换、互换
}

/** 只增不减的整数数组。 */
class Growing {
  constructor() {
    this.items = new Uint32Array(1 << 12)
    this.size = 0
  }

  push(value) {
    if (this.size === this.items.length) {
      const items = new Uint32Array(2 * this.size)
      items.set(this.items)
      this.items = items
    }
    this.items[this.size++] = value
  }
}

class Index {
  constructor({ config = {}, docs }) {
    setSimplified(config.simplified ?? "")
    this.synonyms = (config.synonyms ?? []).map((group) => group.map(fold))
    this.docs = []
    this.pages = [] // 每页：own 是这一页自己的序号，docs 是它的各小节
    this.names = new Map() // 页名（标题冒号前的一截、网址的最后一段）-> 叫这个名字的各页
    this.terms = 0
    this.words = new Map() // 字母词 -> 词元的序号
    this.spellings = new Map() // 字母词在正文里的写法 -> 各词元的序号：同一个写法只拆一次
    this.chars = new Uint16Array(0x10000) // 汉字 -> 1、2、3……；没见过的是 0
    this.charCount = 0
    this.bigrams = new Map() // 两字组合（见 bigram）-> 词元的序号
    this.build(docs)
    this.vocabulary = [...this.words.keys()].sort()
    const titles = this.pages.flatMap(({ own }) => this.docs[own]?.foldedTitle.match(TOKEN) ?? [])
    this.phrases = [...new Set(titles.filter(isHan))] // 页标题里的各段汉字，补全用
    const zeros = () => new Float64Array(this.docs.length)
    this.found = { scores: zeros(), chosen: new Uint16Array(this.docs.length), terms: (id) => this.found.variants[this.found.chosen[id]] }
    this.scratch = { sum: zeros(), covered: zeros(), best: zeros(), inTitle: zeros() } // 每次用完都归零
  }

  build(docs) {
    const found = { term: new Growing(), frequency: new Growing(), ends: [] } // 倒排之前：第 i 个小节的到 ends[i] 为止
    const seen = [] // 词元 -> 最近一次见到它的小节
    const frequency = [] // 词元 -> 它在这一小节的加权词频，乘 2，标题里有就再加 1
    const pages = new Map() // 页的网址 -> 页
    for (const { location, title, text, tags = [], boost = 1 } of docs) {
      const id = this.docs.length
      const [url, anchor] = location.split("#")
      const own = anchor === undefined
      const doc = { location, title, text, tags, boost, own, foldedTitle: fold(title), foldedText: fold(text), foldedTags: fold(tags.join("\n")), length: 0 }
      this.docs.push(doc)
      if (!pages.has(url)) pages.set(url, { own: undefined, docs: [] })
      const page = (doc.page = pages.get(url))
      page.docs.push(id)
      const here = []
      const count = (folded, weight) =>
        this.eachTerm(folded, (term) => {
          if (seen[term] !== id) {
            seen[term] = id
            frequency[term] = titled
            here.push(term)
          }
          frequency[term] += 2 * weight
          doc.length++
        })
      let titled = 1
      count(doc.foldedTitle, own ? WEIGHT.page : WEIGHT.section)
      titled = 0
      count(doc.foldedText, WEIGHT.text)
      if (own) {
        page.own = id
        for (const tag of tags) count(fold(tag), WEIGHT.tags)
        const path = fold(url.replace(/(\.html|\/)$/, "")).split("/")
        count(path.join(" "), WEIGHT.path)
        for (const name of new Set([doc.foldedTitle.split("：")[0], path.at(-1)].map((text) => split(text).join(""))))
          this.names.set(name, [...(this.names.get(name) ?? []), id])
      }
      for (const term of here) {
        found.term.push(term)
        found.frequency.push(frequency[term])
      }
      found.ends.push(found.term.size)
    }
    this.pages = [...pages.values()]
    this.invert(found)
  }

  /** 归一化的文字里的各词元，逐个交给 visit。 */
  eachTerm(folded, visit) {
    let last = 0 // 前一个汉字；0 是没有
    let alone = false // 前一个汉字的前面不是汉字
    for (let i = 0; i <= folded.length; i++) {
      const code = folded.charCodeAt(i) // 末尾之后是 NaN
      const char = han(code) ? (this.chars[code] ||= ++this.charCount) : 0
      if (last && (char || alone)) visit(this.bigram(last, char))
      alone = !last
      last = char
    }
    for (const token of folded.match(WORDS) ?? []) {
      let terms = this.spellings.get(token)
      if (!terms) this.spellings.set(token, (terms = words(token).map((word) => this.word(word))))
      for (const term of terms) visit(term)
    }
  }

  /** 按小节排的 (小节, 词元, 词频) → 按词元排的 (小节, 分)。第 t 个词元在 [starts[t], starts[t + 1])。 */
  invert({ term, frequency, ends }) {
    const average = this.docs.reduce((sum, { length }) => sum + length, 0) / (this.docs.length || 1)
    this.norm = this.docs.map(({ length }) => K1 * (1 - B + (B * length) / average))
    this.starts = new Uint32Array(this.terms + 1)
    for (let i = 0; i < term.size; i++) this.starts[term.items[i] + 1]++
    for (let t = 0; t < this.terms; t++) this.starts[t + 1] += this.starts[t]
    const at = this.starts.slice()
    this.ids = new Uint32Array(term.size)
    this.gains = new Float32Array(term.size)
    this.titled = new Uint8Array(term.size)
    for (let i = 0, id = 0; i < term.size; i++) {
      while (i === ends[id]) id++
      const k = at[term.items[i]]++
      this.ids[k] = id
      this.gains[k] = this.gain(frequency.items[i] >> 1, id)
      this.titled[k] = frequency.items[i] & 1
    }
  }

  /** 词频 → BM25 的分，还没有乘 idf。 */
  gain(frequency, id) {
    return (frequency * (K1 + 1)) / (frequency + this.norm[id])
  }

  /** 相邻两个汉字的词元；second 是 0 时是前后都没有汉字的单字。 */
  bigram(first, second) {
    const key = first * 0x8000 + second
    let term = this.bigrams.get(key)
    if (term === undefined) this.bigrams.set(key, (term = this.terms++))
    return term
  }

  word(word) {
    let term = this.words.get(word)
    if (term === undefined) this.words.set(word, (term = this.terms++))
    return term
  }

  /** 一个词元的 [各小节, 各自的分, 标题里有没有]；没有这个词元就是空的。 */
  postings(term) {
    const [from, to] = term === undefined ? [0, 0] : [this.starts[term], this.starts[term + 1]]
    return [this.ids.subarray(from, to), this.gains.subarray(from, to), this.titled.subarray(from, to)]
  }

  /** 含有这个汉字的小节：单字自己没有倒排表，由含它的两字组合凑出来。 */
  containing(char) {
    const number = this.chars[char.charCodeAt(0)]
    const ids = new Set()
    if (number)
      for (const [key, term] of this.bigrams)
        if (key >> 15 === number || (key & 0x7fff) === number) for (const id of this.postings(term)[0]) ids.add(id)
    const titled = Array.from(ids, (id) => Number(this.docs[id].foldedTitle.includes(char)))
    const gains = Array.from(ids, (id, k) => this.gain(titled[k] ? WEIGHT.section : WEIGHT.text, id))
    return [[...ids], gains, titled]
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
    let found = this.expanded.get(word)
    if (found) return found
    if (word.length === 1) found = [[word, 1]]
    else found = this.startingWith(word).map((token) => [token, token === word ? 1 : PREFIX])
    if (!found.length && word.length >= 4)
      found = this.vocabulary.filter((token) => oneEdit(word, token)).slice(0, MAX_EXPANSIONS).map((token) => [token, TYPO])
    this.expanded.set(word, found)
    return found
  }

  /** 一个查询词 → 几组 [各小节, 各自的分, 标题里有没有, 权重]。组里任一个对上就算这一组对上：汉字每两字一组，字母整个词一组。 */
  groups(term) {
    if (!isHan(term)) return [this.expand(term).map(([word, weight]) => [...this.postings(this.words.get(word)), weight])]
    if (term.length === 1) return [[[...this.containing(term), 1]]]
    const numbers = Array.from(term, (char) => this.chars[char.charCodeAt(0)])
    return numbers.slice(1).map((second, i) => [[...this.postings(this.bigrams.get(numbers[i] * 0x8000 + second)), 1]])
  }

  /** 一组的稀有程度。前缀与错字跟着原词算：clip 处处都有，clipping 少见也不比它值钱。 */
  idf(group) {
    const whole = group.find(([, , , weight]) => weight === 1)
    const df = Math.min(this.docs.length, whole ? whole[0].length : group.reduce((sum, [ids]) => sum + ids.length, 0))
    return df && Math.log(1 + (this.docs.length - df + 0.5) / (df + 0.5))
  }

  /** 一个查询词在各小节的得分：[各小节, 各自的分, 标题里有它的各页]。 */
  scoreTerm(term) {
    const { sum, covered, best, inTitle } = this.scratch
    const touched = []
    let total = 0
    for (const group of this.groups(term)) {
      const here = []
      const idf = this.idf(group)
      for (const [ids, gains, titled, weight] of group) {
        for (let k = 0; k < ids.length; k++) {
          const id = ids[k]
          inTitle[id] |= titled[k]
          const score = weight * idf * gains[k]
          if (score <= best[id]) continue
          if (!best[id]) here.push(id)
          best[id] = score
        }
      }
      total += idf // 全站都没有的两字组合（词与词的接缝）不算没覆盖到
      for (const id of here) {
        if (!sum[id]) touched.push(id)
        sum[id] += best[id]
        covered[id] += idf
        best[id] = 0
      }
    }
    const pages = []
    const scores = touched.map((id) => {
      const coverage = Math.min(1, covered[id] / total)
      const closeness = this.closeness(this.docs[id], term, coverage, inTitle[id])
      const score = sum[id] * coverage * coverage * closeness
      if (this.docs[id].own && closeness >= 2) pages.push(this.docs[id].page)
      sum[id] = covered[id] = inTitle[id] = 0
      return score
    })
    return [touched, scores, pages]
  }

  /** 整个词连在一起、在标题里，分数加倍；汉字散着的打折。 */
  closeness({ foldedTitle, foldedText, foldedTags, own }, term, coverage, inTitle) {
    if (!isHan(term) || term.length <= 2) return !inTitle ? 1 : own ? 2.5 : 1.5
    if (coverage <= 0.999) return APART
    if (foldedTitle.includes(term)) return 2
    return foldedText.includes(term) || foldedTags.includes(term) ? 1.5 : APART
  }

  /** 同一句查询的几种写法，各是词的数组：连写与分写、同义词。同义词与原词一样算。 */
  variants(query) {
    const seen = new Map()
    const add = (text) => {
      const terms = split(text)
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
        if (isHan(term)) return
        const joined = term.split(NOT_ALNUM).join("")
        if (joined !== term && this.words.has(joined)) swap(1, joined) // ip-adapter → ipadapter
        const next = terms[i + 1]
        if (next && !isHan(next) && this.words.has(joined + next)) swap(2, joined + next) // ip adapter → ipadapter
        if (this.words.has(joined)) return
        for (let cut = 2; cut <= joined.length - 2; cut++) // ipadapter → ip adapter
          if (this.words.has(joined.slice(0, cut)) && this.words.has(joined.slice(cut))) swap(1, `${joined.slice(0, cut)} ${joined.slice(cut)}`)
      })
    }
    return [...seen.values()]
  }

  /** 各小节的最高分，与取到它的是哪一种写法；一个也没有就是 null。 */
  score(query) {
    const variants = this.variants(query)
    const { scores, chosen } = this.found // 每次查询都用这两个，省得扔掉几百 KB 让浏览器回收
    scores.fill(0)
    this.found.variants = variants
    const memory = new Map()
    for (const term of variants.flat()) if (!memory.has(term)) memory.set(term, this.scoreTerm(term))
    const { sum, covered: matched } = this.scratch // matched 的第 i 位：有没有第 i 个词
    variants.forEach((terms, variant) => {
      const distinct = [...new Set(terms)].slice(0, 31)
      const weights = distinct.map((term) => (isHan(term) && term.length === 1 ? SINGLE : 1))
      const whole = weights.reduce((sum, weight) => sum + weight, 0)
      const touched = []
      distinct.forEach((term, i) => {
        const [ids, gains] = memory.get(term)
        for (let k = 0; k < ids.length; k++) {
          const id = ids[k]
          if (!matched[id]) touched.push(id)
          matched[id] |= 1 << i
          sum[id] += gains[k]
        }
      })
      distinct.forEach((term, i) => {
        for (const page of memory.get(term)[2]) for (const id of page.docs) if (matched[id]) matched[id] |= 1 << i // 页标题里有的词，小节不必再说
      })
      const typing = terms.length === 1 && !isHan(terms[0]) && !this.words.has(terms[0]) // 没打完，或打错了
      const names = typing ? this.expand(terms[0]).map(([word]) => word) : [terms.join("")]
      const named = names.flatMap((name) => this.names.get(name) ?? [])
      for (const id of touched) {
        const share = weights.reduce((sum, weight, i) => (matched[id] & (1 << i) ? sum + weight : sum), 0) / whole
        const score = sum[id] * share * share * this.docs[id].boost * (named.includes(id) ? NAMED : 1)
        sum[id] = matched[id] = 0
        if (score <= scores[id]) continue
        scores[id] = score
        chosen[id] = variant
      }
    })
    return scores.some((score) => score > 0) ? this.found : null
  }

  search(raw) {
    const query = fold(raw).trim()
    const asked = query.match(TOKEN)
    if (!asked) return NOTHING
    this.expanded = new Map()
    let found = this.score(query)
    const near = !found
    if (near) found = this.score(this.similar(query)) // 一个也没有：找相近的
    const items = found ? this.rank(found.scores, near ? 5 : MAX_PAGES).map((page) => this.group(page, found, asked, near ? query : null)) : []
    return { items, suggest: this.suggest(query) }
  }

  /** 相近的查询：汉字拆成单字，字母词换成相邻两字母重合最多（至少一半）的那个。 */
  similar(query) {
    const alike = (word) => {
      let best = ""
      let most = 0.5
      for (const other of this.vocabulary) {
        let shared = 0
        for (let i = 1; i < other.length; i++) if (word.includes(other.slice(i - 1, i + 1))) shared++
        const score = (2 * shared) / (word.length + other.length - 2)
        if (score > most) [best, most] = [other, score]
      }
      return best
    }
    return split(query).map((term) => (isHan(term) ? [...term].join(" ") : alike(term))).join(" ")
  }

  /** 先自问几条：浏览器编译好热的函数之后，读者的第一条查询才不慢。 */
  warm() {
    for (const { own } of this.pages.slice(0, WARM_UP)) if (own !== undefined) this.search(this.docs[own].title)
    return this
  }

  /** 分最高的几页：最好的一个小节，加上其后三个的两成。 */
  rank(scores, limit) {
    const ranked = []
    for (const page of this.pages) {
      const top = [0, 0, 0, 0]
      for (const id of page.docs) {
        let score = scores[id]
        for (let k = 0; k < 4 && score > 0; k++) if (score > top[k]) [top[k], score] = [score, top[k]]
      }
      if (top[0]) ranked.push({ page, score: top[0] + 0.2 * (top[1] + top[2] + top[3]) })
    }
    ranked.sort((a, b) => b.score - a.score)
    const floor = (ranked[0]?.score ?? 0) * 0.05
    return ranked.slice(0, limit).filter(({ score }) => score >= floor).map(({ page }) => page)
  }

  /** 一页的各条结果，界面要求里面有这一页本身。 */
  group({ own, docs }, { scores, terms }, asked, missing) {
    const hits = docs.filter((id) => scores[id] > 0).sort((a, b) => scores[b] - scores[a] || a - b)
    const listed = hits.slice(0, SECTIONS)
    if (own !== undefined && !listed.includes(own)) listed.push(own)
    return listed.map((id) => this.present(id, scores[id], terms(scores[id] ? id : hits[0]), asked, missing))
  }

  /** 一条结果。asked 是读者打的词（用同义词找到时也标出来）；missing 是全站都没有的原查询，界面会标成“缺少”。 */
  present(id, score, terms, asked, missing) {
    const doc = this.docs[id]
    const found = new Map(terms.map((term) => [term, this.pieces(term, doc)]))
    const marks = [...new Set([...found.values(), asked.filter((term) => has(doc, term))].flat())]
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

  /** 查询词在小节里出现的样子：整个；汉字不成整个就从左到右取最长的几段，字母词取索引里对上的那个。 */
  pieces(term, doc) {
    if (has(doc, term)) return [term]
    if (!isHan(term)) return this.expand(term).map(([word]) => word).filter((word) => has(doc, word)).slice(0, 1)
    const found = []
    for (let i = 0; i < term.length - 1; ) {
      let end = i + 2
      while (end <= term.length && has(doc, term.slice(i, end))) end++
      if (--end - i >= 2) found.push(term.slice(i, end))
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
    if (isHan(tail)) {
      for (const phrase of this.phrases) {
        const at = phrase.indexOf(tail)
        const rest = at < 0 ? "" : phrase.slice(at)
        if (rest.length > tail.length && (!best || rest.length < best.length)) best = rest
      }
    } else if (tail) {
      const size = (word) => this.postings(this.words.get(word))[0].length
      best = this.startingWith(tail).filter((word) => word !== tail).sort((a, b) => size(b) - size(a))[0] ?? ""
    }
    return best && last.endsWith(tail) ? [last.slice(0, last.length - tail.length) + best] : []
  }
}

/** 查询里有没有这个说法；字母词要整词。 */
function mentions(query, phrase) {
  const at = query.indexOf(phrase)
  if (at < 0) return false
  const joined = (before, after) => alnum(query.charCodeAt(before)) && alnum(query.charCodeAt(after))
  return !joined(at - 1, at) && !joined(at + phrase.length - 1, at + phrase.length)
}

/** word 在 folded 里从 from 起第一次出现的位置；字母词要从词首算起，clip 里没有 ip。 */
function locate(folded, word, from = 0) {
  let at = folded.indexOf(word, from)
  if (alnum(word.charCodeAt(0))) while (at > 0 && alnum(folded.charCodeAt(at - 1))) at = folded.indexOf(word, at + 1)
  return at
}

const has = (doc, word) => locate(doc.foldedText, word) >= 0 || locate(doc.foldedTitle, word) >= 0 || locate(doc.foldedTags, word) >= 0

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;" }
const escape = (text) => text.replace(/[&<>]/g, (char) => ENTITIES[char])

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
    .then((data) => new Index(data).warm())
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
