//! The chart: progress, workers and what waits, over time, as SVG.

use std::fmt::Write as _;

use super::report::Report;
use super::scenario::Stage;
use super::text::{amount, short, time};
use super::timeline::Point;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 96.0;
const PANEL: f64 = 150.0;
const GAP: f64 = 46.0;

/// Points of a line at most: more than the chart has pixels for show nothing.
const MAX_POINTS: usize = 700;

/// Steps of an axis, of which one is chosen: 1, 2 or 5 times a power of ten.
const NICE: [f64; 3] = [1.0, 2.0, 5.0];

/// Steps of the time axis in seconds.
const TIME_STEPS: [f64; 20] = [
    0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_200.0, 1_800.0, 3_600.0, 7_200.0,
    21_600.0, 43_200.0, 86_400.0, 172_800.0,
];

/// Where a time and a value are on the page.
struct Panel {
    top: f64,
    /// The time at the right end, and the value at the top.
    end: f64,
    max: f64,
}

impl Panel {
    fn x(&self, at: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * at / self.end
    }

    fn y(&self, value: f64) -> f64 {
        self.top + PANEL - PANEL * value / self.max
    }

    fn bottom(&self) -> f64 {
        self.top + PANEL
    }

    /// A line through the values of points; `stepped` where a value holds until the next point.
    fn path(&self, points: &[&Point], stepped: bool, value: impl Fn(&Point) -> f64) -> String {
        let mut path = String::new();
        for (nth, point) in points.iter().enumerate() {
            let (x, y) = (self.x(point.at), self.y(value(point)));
            let _ = match nth {
                0 => write!(path, "M{x:.1} {y:.1}"),
                _ if stepped => write!(path, "H{x:.1}V{y:.1}"),
                _ => write!(path, "L{x:.1} {y:.1}"),
            };
        }
        path
    }

    /// The area below such a line.
    fn area(&self, points: &[&Point], stepped: bool, value: impl Fn(&Point) -> f64) -> String {
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
        let (from, to, bottom) = (self.x(first.at), self.x(last.at), self.bottom());
        format!("{}L{to:.1} {bottom:.1}L{from:.1} {bottom:.1}Z", self.path(points, stepped, value))
    }
}

/// Draws a report.
pub(super) fn svg(report: &Report) -> String {
    let timeline = &report.timeline;
    let every = timeline.points.len().div_ceil(MAX_POINTS).max(1);
    let last = timeline.points.len().saturating_sub(1);
    let points: Vec<&Point> = timeline
        .points
        .iter()
        .enumerate()
        .filter(|(nth, _)| nth % every == 0 || *nth == last)
        .map(|(_, point)| point)
        .collect();
    let shown = report.deadline.filter(|deadline| *deadline < 3.0 * timeline.duration());
    let end = timeline.duration().max(shown.unwrap_or_default()).max(1e-3) * 1.02;
    let most = points.iter().map(|p| f64::from(p.workers + p.starting)).fold(1.0, f64::max);
    let waiting = points.iter().map(|p| p.amounts.backlog()).fold(1.0, f64::max);
    let panel = |nth: f64, max: f64| Panel { top: TOP + nth * (PANEL + GAP), end, max };
    let progress = panel(0.0, 100.0);
    let workers = panel(1.0, nice_max(most));
    let waits = panel(2.0, nice_max(waiting));

    let height = waits.bottom() + 92.0;
    let mut svg = String::new();
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="system-ui, sans-serif" font-size="12" fill="#334155">
<title>{title}</title>
<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>
<text x="{LEFT}" y="34" font-size="19" font-weight="600" fill="#0f172a">{title}</text>
<text x="{LEFT}" y="56">{subtitle}</text>
"##,
        title = title(report),
        subtitle = subtitle(report),
    );
    for panel in [&progress, &workers, &waits] {
        bands(&mut svg, report, panel);
    }
    axes(&mut svg, &progress, "rows searchable (%)", 25.0);
    axes(&mut svg, &workers, "workers", nice_step(workers.max / 4.0).max(1.0));
    axes(&mut svg, &waits, "changes waiting", nice_step(waits.max / 4.0));
    time_axis(&mut svg, &waits, &[&progress, &workers, &waits]);

    let records = report.scenario.records;
    let done = |p: &Point| (100.0 * (p.amounts.done_bulk - p.amounts.spilled).max(0.0) / records).min(100.0);
    shape(&mut svg, &progress.area(&points, false, done), "none", "#0d948833");
    shape(&mut svg, &progress.path(&points, false, done), "#0d9488", "none");
    let asked = |p: &Point| f64::from(p.workers + p.starting);
    let working = |p: &Point| f64::from(p.workers);
    shape(&mut svg, &workers.area(&points, true, asked), "none", "#2563eb22");
    shape(&mut svg, &workers.area(&points, true, working), "none", "#2563eb33");
    shape(&mut svg, &workers.path(&points, true, working), "#2563eb", "none");
    let all = |p: &Point| p.amounts.backlog();
    let queued = |p: &Point| p.amounts.queue_bulk + p.amounts.queue_live;
    shape(&mut svg, &waits.area(&points, false, all), "none", "#a1620733");
    shape(&mut svg, &waits.area(&points, false, queued), "none", "#ea580c55");
    shape(&mut svg, &waits.path(&points, false, all), "#a16207", "none");
    key(&mut svg, &workers, &[("#2563eb66", "working"), ("#2563eb22", "starting")]);
    key(&mut svg, &waits, &[("#ea580c77", "in the queue"), ("#a1620733", "in the outbox")]);
    if let Some(deadline) = shown {
        let x = progress.x(deadline);
        let (top, bottom) = (progress.top - 6.0, waits.bottom());
        let is_left = x < WIDTH / 2.0;
        let _ = writeln!(
            svg,
            r##"<path d="M{x:.1} {top}V{bottom}" stroke="#dc2626" stroke-width="1.5" stroke-dasharray="5 4"/>
<text x="{at:.1}" y="{y}" text-anchor="{anchor}" fill="#dc2626">deadline {deadline}</text>"##,
            at = if is_left { x + 6.0 } else { x - 6.0 },
            y = progress.top + 16.0,
            anchor = if is_left { "start" } else { "end" },
            deadline = time(deadline),
        );
    }
    legend(&mut svg, report, height - 22.0);
    svg.push_str("</svg>\n");
    svg
}

fn title(report: &Report) -> String {
    let rows = amount(report.scenario.records);
    match report.timeline.drained {
        Some(drained) => format!("{rows} rows are searchable after {}", time(drained)),
        None => format!("{rows} rows are never all searchable"),
    }
}

fn subtitle(report: &Report) -> String {
    let most = match report.timeline.most_workers() {
        1 => "1 worker".to_owned(),
        most => format!("up to {most} workers"),
    };
    let rate = amount(report.scenario.worker_rate);
    let edits = report.scenario.edits;
    format!(
        "{most} of {rate} rows/s each, {edits} edits a second; the colours behind tell what limits the flow"
    )
}

fn shape(svg: &mut String, path: &str, stroke: &str, fill: &str) {
    let _ = writeln!(
        svg,
        r#"<path d="{path}" stroke="{stroke}" stroke-width="2" stroke-linejoin="round" fill="{fill}"/>"#
    );
}

/// The colour of a stage behind the lines.
fn colour(stage: Stage) -> &'static str {
    match stage {
        Stage::Load => "#e0f2fe",
        Stage::Relay => "#ede9fe",
        Stage::QueueInFlight => "#fef3c7",
        Stage::Workers => "#dbeafe",
        Stage::Database => "#dcfce7",
        Stage::IndexInserts => "#ffe4e6",
        Stage::IndexRequests => "#fce7f3",
        Stage::IndexBytes => "#ffedd5",
        Stage::None => "#f8fafc",
    }
}

/// What limits the flow, behind a panel.
fn bands(svg: &mut String, report: &Report, panel: &Panel) {
    for phase in report.timeline.phases() {
        let (from, to) = (panel.x(phase.from), panel.x(phase.to));
        let _ = writeln!(
            svg,
            r#"<rect x="{from:.1}" y="{top}" width="{width:.1}" height="{PANEL}" fill="{fill}"><title>{name}</title></rect>"#,
            top = panel.top,
            width = to - from,
            fill = colour(phase.limit),
            name = phase.limit.name(),
        );
    }
}

fn legend(svg: &mut String, report: &Report, y: f64) {
    let mut stages: Vec<Stage> = report.timeline.phases().into_iter().map(|phase| phase.limit).collect();
    stages.sort_unstable();
    stages.dedup();
    let mut x = LEFT;
    for stage in stages {
        let name = stage.name();
        let _ = writeln!(
            svg,
            r##"<rect x="{x}" y="{top}" width="14" height="14" rx="3" fill="{fill}" stroke="#cbd5e1"/><text x="{text}" y="{y}">{name}</text>"##,
            top = y - 11.0,
            fill = colour(stage),
            text = x + 20.0,
        );
        x += 44.0 + 6.8 * name.len() as f64;
    }
}

/// What the areas of a panel are, above its right end.
fn key(svg: &mut String, panel: &Panel, areas: &[(&str, &str)]) {
    let mut x = WIDTH - RIGHT;
    let y = panel.top - 9.0;
    for (colour, name) in areas.iter().rev() {
        let _ = writeln!(
            svg,
            r#"<text x="{x}" y="{y}" text-anchor="end">{name}</text><rect x="{mark}" y="{top}" width="10" height="10" rx="2" fill="{colour}"/>"#,
            mark = x - 16.0 - 6.3 * name.len() as f64,
            top = y - 9.0,
        );
        x -= 36.0 + 6.3 * name.len() as f64;
    }
}

/// The value axis of a panel, with its name above.
fn axes(svg: &mut String, panel: &Panel, name: &str, step: f64) {
    let right = WIDTH - RIGHT;
    let _ = writeln!(
        svg,
        r##"<text x="{LEFT}" y="{y}" font-weight="600" fill="#0f172a">{name}</text>"##,
        y = panel.top - 9.0
    );
    let mut value = 0.0;
    while value <= panel.max * 1.001 {
        let y = panel.y(value);
        let _ = writeln!(
            svg,
            r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#cbd5e1" stroke-width="{width}"/><text x="{x}" y="{base:.1}" text-anchor="end">{label}</text>"##,
            width = if value == 0.0 { 1.2 } else { 0.6 },
            x = LEFT - 8.0,
            base = y + 4.0,
            label = short(value),
        );
        value += step;
    }
}

/// The time axis below the last panel, with its lines in all of them.
fn time_axis(svg: &mut String, last: &Panel, panels: &[&Panel]) {
    let wanted = last.end / 8.0;
    let step = TIME_STEPS
        .into_iter()
        .find(|step| *step >= wanted)
        .unwrap_or_else(|| 86_400.0 * nice_step(wanted / 86_400.0));
    let mut at = 0.0;
    while at <= last.end {
        let x = last.x(at);
        for panel in panels {
            let (top, bottom) = (panel.top, panel.bottom());
            let _ =
                writeln!(svg, r##"<path d="M{x:.1} {top}V{bottom}" stroke="#cbd5e1" stroke-width="0.4"/>"##);
        }
        let label = if at == 0.0 { "0".to_owned() } else { time(at) };
        let y = last.bottom() + 18.0;
        let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y}" text-anchor="middle">{label}</text>"#);
        at += step;
    }
    let (x, y) = ((LEFT + WIDTH - RIGHT) / 2.0, last.bottom() + 38.0);
    let _ = writeln!(svg, r#"<text x="{x}" y="{y}" text-anchor="middle">time since the load began</text>"#);
}

/// The nearest round number that is no less.
fn nice_step(least: f64) -> f64 {
    let power = 10.0_f64.powf(least.max(1e-9).log10().floor());
    NICE.into_iter().map(|nice| nice * power).find(|step| *step >= least * 0.999).unwrap_or(10.0 * power)
}

/// A round end of an axis that holds a value.
fn nice_max(value: f64) -> f64 {
    let step = nice_step(value / 4.0);
    (value / step).ceil() * step
}
