// A picture of a dashboard, drawn by Grafana's own panels, of what a running Prometheus has:
//
//   kpdeploy monitor up models/                                  # in another terminal; wait ten minutes
//   cd scripts/dashboard_picture
//   kpdeploy monitor dashboard ../../models -o dashboard.json
//   npm install --legacy-peer-deps
//   node picture.mjs dashboard.json http://127.0.0.1:9090 out.png Overview Latency Server    # rows; default: all
//
// CHROMIUM names the browser (default: /usr/bin/chromium), MINUTES how far back it looks (default: 10).
import { readFileSync, writeFileSync } from 'node:fs';
import puppeteer from 'puppeteer-core';
import { build, preview } from 'vite';

const [file, prometheus, out, ...rows] = process.argv.slice(2);
const dashboard = JSON.parse(readFileSync(file, 'utf8'));
const end = Date.now() / 1000;
const start = end - 60 * Number(process.env.MINUTES ?? 10);
const series = {};
for (const target of dashboard.panels.flatMap((panel) => panel.targets ?? [])) {
  const query = new URLSearchParams({ query: target.expr.replaceAll('$model', '.*'), start, end, step: 5 });
  series[target.expr] = (await (await fetch(`${prometheus}/api/v1/query_range?${query}`)).json()).data.result;
}
writeFileSync('data.json', JSON.stringify({ dashboard, rows, start, end, series }));

await build({ define: { global: 'globalThis' }, logLevel: 'error' });
const server = await preview({ preview: { host: '127.0.0.1' } });
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox'],
});
const page = await browser.newPage();
await page.setViewport({ width: 1532, height: 1200 });
await page.goto(server.resolvedUrls.local[0], { waitUntil: 'networkidle0' });
await page.screenshot({ path: out, fullPage: true });
await browser.close();
await server.close();
