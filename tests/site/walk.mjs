// Walk the built site in headless Chromium, from disk and without a network, and report what is broken:
//
//     node tests/site/walk.mjs SITE PACKAGES SCREENSHOTS [PAGE ...]
//
// SITE is the folder of the site, PACKAGES the one with node_modules, SCREENSHOTS the one for pictures (of each PAGE,
// a path in the site, or of some pages if there is none), at the sizes of a desktop and a phone, light and dark. A fault is an error on the console, a request that fails or goes to
// another host, a link or a picture that leads nowhere, and an element wider than the page that has no scroll
// bar of its own. The search is asked for a word. The status is 1 if there is a fault.
import { existsSync, mkdirSync, readdirSync } from "node:fs"
import { createRequire } from "node:module"
import { join, relative, resolve } from "node:path"
import { pathToFileURL } from "node:url"

const [site, packages, screenshots, ...wanted] = process.argv.slice(2).map((path, index) => (index < 3 ? resolve(path) : path))
const PICTURED = ["index.html", "methods/emulation.html", "methods/weights.html", "methods/pruning.html", "methods/drift.html",
  "results/index.html", "results/modules.html", "reference.html", "reference/callbacks.html"]
const SIZES = { desktop: [1280, 900], phone: [390, 844] }
const QUERY = "requantize"

// The browser comes packed, with libraries that a machine may lack. It is unpacked into the folder for
// temporary files, so that is set first; the two variables make the package unpack the libraries and search them.
process.env.TMPDIR = join(packages, "unpacked")
process.env.AWS_EXECUTION_ENV ??= "AWS_Lambda_nodejs20.x"
// Its own fonts have none for code.
if (existsSync("/etc/fonts/fonts.conf")) process.env.FONTCONFIG_PATH ??= "/etc/fonts"
mkdirSync(process.env.TMPDIR, { recursive: true })
const require = createRequire(join(packages, "package.json"))
const puppeteer = require("puppeteer-core")
const required = require("@sparticuz/chromium")
const chromium = required.default ?? required

const faults = []

async function main() {
  const browser = await launched()
  console.log(`${await browser.version()}, ${site}`)
  const pages = htmlFiles(site)
  const anchors = new Map()
  const links = []
  for (const [index, path] of pages.entries()) {
    for (const [size, [width, height]] of Object.entries(SIZES)) {
      const page = await opened(browser, path, width, height, "light")
      const seen = await page.evaluate(inspected)
      faults.push(...seen.faults.map(fault => `${path} (${size}): ${fault}`))
      anchors.set(path, new Set(seen.anchors))
      if (size === "desktop") links.push(...seen.links.map(link => [path, link]))
      await page.browserContext().close()
    }
    if (index % 10 === 9) console.log(`${index + 1} of ${pages.length} pages`)
  }
  faults.push(...links.map(([path, link]) => brokenLink(path, link, anchors)).filter(Boolean))
  await search(browser, "desktop", "light")
  for (const path of wanted.length ? wanted : PICTURED.filter(path => pages.includes(path))) {
    await pictured(browser, path)
  }
  await search(browser, "phone", "dark")
  await browser.close()
  const every = [...new Set(faults)]
  every.forEach(fault => console.error(fault))
  console.log(`${pages.length} pages, ${links.length} links, ${every.length} faults; screenshots in ${screenshots}`)
  process.exitCode = every.length ? 1 : 0
}

async function launched() {
  chromium.setGraphicsMode = false
  const executablePath = await chromium.executablePath()
  // Flags of the package for one process in a small container crash on long pages.
  const args = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--font-render-hinting=none"]
  return puppeteer.launch({ executablePath, args, headless: "shell", ignoreDefaultArgs: ["--hide-scrollbars"] })
}

function htmlFiles(folder) {
  return readdirSync(folder, { recursive: true })
    .map(path => path.replaceAll("\\", "/"))
    // Every page has the links of the page for errors, from the root of a server.
    .filter(path => path.endsWith(".html") && path !== "404.html")
    .sort()
}

async function opened(browser, path, width, height, scheme) {
  // In a context of its own no page knows what another one has stored, such as its colors.
  const context = await browser.createBrowserContext()
  const page = await context.newPage()
  page.on("console", message => {
    if (["error", "warn", "warning"].includes(message.type())) faults.push(`${path}: console: ${message.text()}`)
  })
  page.on("pageerror", error => faults.push(`${path}: ${error.message}`))
  page.on("requestfailed", request => faults.push(`${path}: request failed: ${request.url()}`))
  page.on("request", request => {
    if (/^https?:/.test(request.url())) faults.push(`${path}: asks another host: ${request.url()}`)
  })
  await page.setViewport({ width, height, isMobile: width < 600, hasTouch: width < 600 })
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }])
  await page.goto(pathToFileURL(join(site, path)).href, { waitUntil: "load" })
  return page
}

// Runs in the page.
function inspected() {
  const width = document.documentElement.clientWidth
  const faults = []
  if (document.documentElement.scrollWidth > width) {
    faults.push(`the page is ${document.documentElement.scrollWidth} wide, its window ${width}`)
  }
  const scrolls = element => {
    for (let box = element.parentElement; box && box !== document.body; box = box.parentElement) {
      if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return true
    }
    return false
  }
  const faulty = []
  for (const element of document.querySelectorAll("article *")) {
    const box = element.getBoundingClientRect()
    if (faulty.some(outer => outer.contains(element))) continue
    if (box.width && box.right > width + 1 && !scrolls(element)) {
      faulty.push(element)
      faults.push(`<${element.tagName.toLowerCase()}> ends at ${Math.round(box.right)} of ${width}: ${element.textContent.trim().slice(0, 50)}`)
    }
  }
  for (const image of document.images) {
    if (image.complete && image.naturalWidth === 0) faults.push(`no picture: ${image.src}`)
  }
  return {
    faults,
    anchors: [...document.querySelectorAll("[id]")].map(element => element.id),
    links: [...document.querySelectorAll("a[href]")].map(link => link.href),
  }
}

function brokenLink(path, link, anchors) {
  if (!link.startsWith("file:")) return null
  const url = new URL(link)
  const target = relative(site, decodeURIComponent(url.pathname)).replaceAll("\\", "/")
  const fragment = decodeURIComponent(url.hash.slice(1))
  if (target.startsWith("..") || !existsSync(join(site, target))) return `${path}: broken link: ${link}`
  const known = anchors.get(target)
  if (fragment && known && !known.has(fragment) && !fragment.startsWith("__")) return `${path}: no such anchor: ${link}`
  return null
}

async function search(browser, size, scheme) {
  const page = await opened(browser, "index.html", ...SIZES[size], scheme)
  if (size === "phone") await page.click("label.md-header__button[for=__search]")
  await page.click("input.md-search__input")
  await page.type("input.md-search__input", QUERY)
  await page.waitForSelector(".md-search-result__item", { timeout: 15000 }).catch(() => {
    faults.push(`search (${size}): nothing about ${QUERY}`)
  })
  await new Promise(done => setTimeout(done, 400))
  await saved(page, `search-${size}-${scheme}`, false)
  await page.browserContext().close()
}

async function pictured(browser, path) {
  for (const [size, [width, height]] of Object.entries(SIZES)) {
    for (const scheme of ["light", "dark"]) {
      const page = await opened(browser, path, width, height, scheme)
      await new Promise(done => setTimeout(done, 200))
      const name = path.replaceAll("/", "_").replace(".html", "")
      await saved(page, `${name}-${size}-${scheme}`, false)
      await page.browserContext().close()
    }
  }
}

async function saved(page, name, fullPage) {
  mkdirSync(screenshots, { recursive: true })
  await page.screenshot({ path: join(screenshots, `${name}.png`), fullPage })
}

await main()
