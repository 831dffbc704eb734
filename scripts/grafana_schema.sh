#!/usr/bin/env bash
# What Grafana takes as a dashboard of time series over Prometheus, as a JSON schema made of Grafana's own types. The
# unit tests hold `kpdeploy monitor dashboard` to it. Run this (needs node) for another Grafana, and look at the diff.
set -euo pipefail

GRAFANA=12.4.10 PROMETHEUS=12.3.0
out="$(cd "$(dirname "$0")/.." && pwd)/tests/grafana_dashboard.schema.json"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"

npm init --yes > /dev/null
npm install --ignore-scripts --legacy-peer-deps "@grafana/schema@$GRAFANA" "@grafana/data@$GRAFANA" \
  ts-json-schema-generator@2.4.0 typescript@5.9.3
# Its types alone: as a dependency it would bring all of Grafana's interface along.
npm pack "@grafana/prometheus@$PROMETHEUS" > /dev/null
tar -xzf grafana-prometheus-*.tgz package/dist/types/dataquery.d.ts

cat > dashboard.ts <<'TS'
import type { AnnotationQuery, Dashboard, Panel, RowPanel } from '@grafana/schema';
import type { FieldConfig, Options } from '@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/types.gen';
import type { Prometheus } from './package/dist/types/dataquery';

type TimeSeries = Omit<Panel<Options, FieldConfig>, 'type' | 'options' | 'targets'> & {
  type: 'timeseries';
  options?: Partial<Options>;
  targets: Prometheus[];
};
export type OurDashboard = Omit<Dashboard, 'panels' | 'annotations'> & {
  panels: Array<TimeSeries | RowPanel>;
  annotations: { list: Array<AnnotationQuery<Prometheus>> };
};
TS
cat > tsconfig.json <<'JSON'
{"compilerOptions": {"module": "esnext", "moduleResolution": "bundler", "strict": true}, "files": ["dashboard.ts"]}
JSON
# Two of Grafana's files define types of the same names: nothing is exposed by name.
npx ts-json-schema-generator --path dashboard.ts --tsconfig tsconfig.json --type OurDashboard \
  --expose none --no-top-ref --no-type-check -o whole.json
GRAFANA=$GRAFANA PROMETHEUS=$PROMETHEUS node - "$out" <<'JS'
const fs = require('fs');
const told = (key, value) => ['description', 'default', 'deprecated'].includes(key) && typeof value !== 'object';
const strip = (value) =>
  Array.isArray(value) ? value.map(strip)
  : value && typeof value === 'object'
    ? Object.fromEntries(Object.entries(value).filter(([k, v]) => !told(k, v)).map(([k, v]) => [k, strip(v)]))
  : value;
const from = `@grafana/schema ${process.env.GRAFANA}, @grafana/prometheus ${process.env.PROMETHEUS}`;
const schema = { $comment: `${from}; made by scripts/grafana_schema.sh`, ...strip(JSON.parse(fs.readFileSync('whole.json'))) };
fs.writeFileSync(process.argv[2], JSON.stringify(schema, null, 0) + '\n');
JS
echo "$out"
