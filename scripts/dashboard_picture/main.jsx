import { createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext, toDataFrame } from '@grafana/data';
import { GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';
import React from 'react';
import { createRoot } from 'react-dom/client';
import { dashboard, end, rows, series, start } from './data.json';

const theme = createTheme({ colors: { mode: 'light' } });
const LINE = 30, GAP = 8, WIDTH = 1500, COLUMN = (WIDTH + GAP) / 24;
// What Grafana's time series panel sets where a dashboard says nothing.
const DEFAULTS = {
  drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, showPoints: 'never', spanNulls: false,
  axisPlacement: 'auto', gradientMode: 'none', scaleDistribution: { type: 'linear' }, thresholdsStyle: { mode: 'off' },
  stacking: { mode: 'none', group: 'A' }, hideFrom: { legend: false, tooltip: false, viz: false },
};
const range = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: 'now-1h', to: 'now' } };

function framesOf({ targets, fieldConfig }) {
  const found = targets.flatMap(({ expr, legendFormat, refId }) => series[expr].map((one) => ({ ...one, legendFormat, refId })));
  return found.map(({ metric, values, legendFormat, refId }, seriesIndex) => {
    const name = legendFormat.replace(/\{\{(\w+)\}\}/g, (_, label) => metric[label] ?? '');
    const overrides = fieldConfig.overrides.filter(({ matcher }) => matcher.id === 'byName' && matcher.options === name);
    const own = overrides.flatMap(({ properties }) => properties).map(({ id, value }) => [id.replace('custom.', ''), value]);
    const custom = { ...DEFAULTS, ...Object.fromEntries(own) };
    const config = { displayName: name, color: { mode: 'palette-classic' }, ...fieldConfig.defaults, custom };
    const frame = toDataFrame({
      refId,
      fields: [
        { name: 'time', type: FieldType.time, config: {}, values: values.map(([at]) => at * 1000) },
        { name, type: FieldType.number, config, values: values.map(([, value]) => Number(value)) },
      ],
    });
    for (const field of frame.fields) field.display = getDisplayProcessor({ field, theme });
    frame.fields[1].state = { displayName: name, seriesIndex };
    return frame;
  });
}

function Panel({ panel, top }) {
  const { x, w, h } = panel.gridPos;
  const box = { position: 'absolute', left: x * COLUMN, top, width: w * COLUMN - GAP, height: h * (LINE + GAP) - GAP };
  if (panel.type === 'row') return <div style={{ ...box, ...theme.typography.h5, paddingTop: 6 }}>{panel.title}</div>;
  const legend = { displayMode: 'list', placement: 'bottom', showLegend: true, calcs: [] };
  return (
    <div style={box}>
      <PanelChrome title={panel.title} width={box.width} height={box.height}>
        {(width, height) => (
          <TimeSeries
            frames={framesOf(panel)} timeRange={range} timeZone="utc" width={width} height={height} legend={legend}
          />
        )}
      </PanelChrome>
    </div>
  );
}

function Dashboard() {
  // The rows that are wanted, without the room of the others.
  const placed = [];
  let row = '', hidden = 0, last = 0, bottom = 0;
  for (const panel of dashboard.panels) {
    if (panel.type === 'row') row = panel.title;
    const wanted = !rows.length || rows.some((name) => row.startsWith(name));
    const { y, h } = panel.gridPos;
    if (!wanted && y + h > last) hidden += y + h - Math.max(last, y);
    last = Math.max(last, y + h);
    if (!wanted) continue;
    placed.push({ panel, top: (y - hidden) * (LINE + GAP) });
    bottom = Math.max(bottom, (y - hidden + h) * (LINE + GAP));
  }
  return (
    <div style={{ background: theme.colors.background.canvas, padding: 16, width: WIDTH + 32 }}>
      <div style={{ ...theme.typography.h4, marginBottom: 12 }}>{dashboard.title}</div>
      <div style={{ position: 'relative', height: bottom }}>
        {placed.map((entry) => <Panel key={entry.panel.title} {...entry} />)}
      </div>
    </div>
  );
}

createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles isExtensionSidebarOpen={false} />
    <Dashboard />
  </ThemeContext.Provider>
);
