//! The slow path's solver: which demand should go to which supply, when there is not enough of everything.
//!
//! A transportation problem, solved exactly by the network simplex method on a strongly feasible tree (so that it
//! cannot cycle), started from a greedy flow, in integers. Its dual prices say what one more unit of a supply would
//! save: the shadow prices that keep flexible work from what constrained work needs.
//!
//! There is no clock here: the deadline is a number of steps, which the caller measures once.
//!
//! Source of the method: Ahuja, Magnanti and Orlin, Network Flows (1993), chapter 11.
use crate::prelude::*;

/// The demand cannot go to that supply.
pub const FORBIDDEN: i64 = i64::MAX;

/// The largest cost of a unit that is understood; larger ones are taken as this. A potential is a sum of such costs along
/// a path of the tree, and of at most two artificial ones: under 2⁵³ up to four thousand rows or columns.
const COST_MAX: i64 = 1 << 40;
/// What no real arc costs: artificial ones are emptied first.
const ARTIFICIAL: i64 = 1 << 50;

/// What is wanted, what there is, and what each unit of demand costs on each supply.
#[derive(Debug, Clone, Default)]
pub struct Problem {
    /// Units wanted, by row.
    pub demand: Vec<u64>,
    /// Units there are, by column.
    pub supply: Vec<u64>,
    /// By row, then by column; [`FORBIDDEN`] where it may not go.
    pub cost: Vec<i64>,
    /// What a unit costs that goes nowhere, by row.
    pub unserved: Vec<i64>,
}

/// The cheapest way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Solution {
    /// Row, column and units, where any flow.
    pub flow: Vec<(u32, u32, u64)>,
    /// Units that go nowhere, by row.
    pub unserved: Vec<u64>,
    /// What one more unit of each column would save.
    pub prices: Vec<i64>,
    /// Of all of it, unserved units included.
    pub cost: i128,
    /// Steps it took.
    pub steps: u32,
}

/// Solves within `steps_max` steps, or not at all: the caller then keeps what it had.
pub fn solve(problem: &Problem, steps_max: u32) -> Option<Solution> {
    let mut tree = Tree::new(problem);
    let mut steps = 0;
    while let Some((row, column)) = tree.entering() {
        if steps >= steps_max {
            return None;
        }
        steps += 1;
        tree.pivot(row, column);
    }
    Some(tree.solution(problem, steps))
}

/// The most columns that finer steps of price may make.
const COLUMNS_MAX: usize = 2_800;
/// The most steps of one kind of capacity.
const TIERS_MAX: usize = 16;

/// Into how many steps of price each of so many kinds of capacity is told apart: the fewer kinds, the finer.
pub fn tiers(kinds: usize) -> usize {
    (COLUMNS_MAX / kinds.max(1)).clamp(1, TIERS_MAX)
}

/// Tells one kind of capacity apart by price, as pairs of price and units: at most `most` steps, each the mean price of
/// what is in it and its units, cheapest first. What costs the same is never parted, and as long as there are no more
/// prices than steps nothing is lost.
pub fn by_price(devices: impl IntoIterator<Item = (u64, u64)>, most: usize) -> Vec<(u64, u64)> {
    let mut prices: BTreeMap<u64, u64> = BTreeMap::new();
    for (price, units) in devices {
        let sum = prices.entry(price).or_insert(0);
        *sum = sum.saturating_add(units);
    }
    prices.retain(|_, units| *units > 0);
    let total: u128 = prices.values().map(|units| u128::from(*units)).sum();
    let few = prices.len() <= most;
    let mut steps: Vec<(u128, u128, u128)> = Vec::new();
    let mut before = 0u128;
    for (price, units) in prices {
        let (price, units) = (u128::from(price), u128::from(units));
        // Which share of all units lies before: equal shares make the steps.
        let share = if few {
            u128::MAX
        } else {
            before * most.max(1) as u128 / total.max(1)
        };
        before += units;
        match steps.last_mut() {
            Some((known, paid, sum)) if !few && *known == share => {
                *paid += price * units;
                *sum += units;
            }
            _ => steps.push((share, price * units, units)),
        }
    }
    let narrow = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
    steps
        .into_iter()
        .map(|(_, paid, units)| (narrow(paid / units), narrow(units)))
        .collect()
}

/// Nodes of the tree: rows (the last is the slack that fills what nobody wants), columns (the last takes what goes
/// nowhere), and the root.
struct Tree {
    rows: usize,
    columns: usize,
    /// `rows × stride`: integers, of which an `f64` holds these exactly and the compiler makes vectors. Infinite where an
    /// arc is forbidden, and beyond the last column.
    cost: Vec<f64>,
    /// Columns, rounded up to whole vectors.
    stride: usize,
    /// Potentials of the columns once more, side by side with their costs.
    level: Vec<f64>,
    parent: Vec<u32>,
    depth: Vec<u32>,
    /// The arc to the parent leads there; else it comes from there.
    up: Vec<bool>,
    flow: Vec<u64>,
    /// Reduced cost of an arc `i → j` is `cost + potential[i] − potential[j]`.
    potential: Vec<i64>,
    first_child: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    /// Where the search for an entering arc goes on.
    at: usize,
    stack: Vec<u32>,
}

const NONE: u32 = u32::MAX;
/// Columns are looked at eight at a time.
const LANES: usize = 8;

impl Tree {
    fn new(problem: &Problem) -> Self {
        let (demands, supplies) = (problem.demand.len(), problem.supply.len());
        let (rows, columns) = (demands + 1, supplies + 1);
        let nodes = rows + columns + 1;
        let stride = columns.next_multiple_of(LANES);
        let mut cost = vec![f64::INFINITY; rows * stride];
        for row in 0..demands {
            for column in 0..supplies {
                let given = problem
                    .cost
                    .get(row * supplies + column)
                    .copied()
                    .unwrap_or(FORBIDDEN);
                if given != FORBIDDEN {
                    cost[row * stride + column] = given.clamp(0, COST_MAX) as f64;
                }
            }
            let unserved = problem.unserved.get(row).copied().unwrap_or(COST_MAX);
            cost[row * stride + supplies] = unserved.clamp(0, COST_MAX) as f64;
        }
        cost[demands * stride..demands * stride + columns].fill(0.0);
        let mut tree = Self {
            rows,
            columns,
            cost,
            stride,
            level: vec![0.0; stride],
            parent: vec![NONE; nodes],
            depth: vec![0; nodes],
            up: vec![true; nodes],
            flow: vec![0; nodes],
            potential: vec![0; nodes],
            first_child: vec![NONE; nodes],
            next: vec![NONE; nodes],
            previous: vec![NONE; nodes],
            at: 0,
            stack: Vec::new(),
        };
        tree.start(problem);
        tree
    }

    /// A greedy flow: each row in turn takes the cheapest columns that have any left. Every step uses up a row or a
    /// column, so that the arcs in use are a forest; its trees hang from the root by empty arcs that lead there.
    fn start(&mut self, problem: &Problem) {
        let (rows, columns) = (self.rows, self.columns);
        let total_demand = problem.demand.iter().fold(0u64, |sum, n| sum.saturating_add(*n));
        let total_supply = problem.supply.iter().fold(0u64, |sum, n| sum.saturating_add(*n));
        let mut left: Vec<u64> = problem.supply.clone();
        left.push(total_demand);
        let mut arcs: Vec<(u32, u32, u64)> = Vec::with_capacity(rows + columns);
        for row in 0..rows {
            let mut wants = problem.demand.get(row).copied().unwrap_or(total_supply);
            while wants > 0 {
                let costs = &self.cost[row * self.stride..(row + 1) * self.stride];
                let open = (0..columns).filter(|c| left[*c] > 0 && costs[*c] < f64::INFINITY);
                let Some(column) = open.min_by(|a, b| costs[*a].total_cmp(&costs[*b])) else {
                    break;
                };
                let units = wants.min(left[column]);
                wants -= units;
                left[column] -= units;
                arcs.push((row as u32, (rows + column) as u32, units));
            }
        }
        let mut neighbours: Vec<Vec<(u32, u64)>> = vec![Vec::new(); rows + columns];
        for (row, column, units) in arcs {
            neighbours[row as usize].push((column, units));
            neighbours[column as usize].push((row, units));
        }
        let root = (rows + columns) as u32;
        for node in 0..root {
            if self.parent[node as usize] != NONE {
                continue;
            }
            self.attach(node, root, true, 0);
            self.stack.push(node);
            while let Some(node) = self.stack.pop() {
                for (other, units) in core::mem::take(&mut neighbours[node as usize]) {
                    if self.parent[other as usize] == NONE {
                        // A row's arc leads to its column.
                        self.attach(other, node, (other as usize) < rows, units);
                        self.stack.push(other);
                    }
                }
            }
        }
    }

    fn root(&self) -> u32 {
        (self.rows + self.columns) as u32
    }

    /// Cost of the arc between a node and its parent.
    fn arc_cost(&self, node: u32, parent: u32) -> i64 {
        if parent == self.root() {
            return ARTIFICIAL;
        }
        let (row, column) = if (node as usize) < self.rows {
            (node, parent)
        } else {
            (parent, node)
        };
        self.cost[row as usize * self.stride + (column as usize - self.rows)] as i64
    }

    /// Sets a potential, for a column in both places.
    fn lift(&mut self, node: usize, potential: i64) {
        self.potential[node] = potential;
        if node >= self.rows {
            self.level[node - self.rows] = potential as f64;
        }
    }

    fn attach(&mut self, node: u32, parent: u32, up: bool, flow: u64) {
        let (n, p) = (node as usize, parent as usize);
        self.parent[n] = parent;
        self.up[n] = up;
        self.flow[n] = flow;
        self.depth[n] = self.depth[p] + 1;
        let cost = self.arc_cost(node, parent);
        let above = self.potential[p];
        self.lift(n, if up { above - cost } else { above + cost });
        let first = self.first_child[p];
        self.next[n] = first;
        self.previous[n] = NONE;
        if first != NONE {
            self.previous[first as usize] = node;
        }
        self.first_child[p] = node;
    }

    fn detach(&mut self, node: u32) {
        let n = node as usize;
        let (before, after) = (self.previous[n], self.next[n]);
        match before {
            NONE => self.first_child[self.parent[n] as usize] = after,
            before => self.next[before as usize] = after,
        }
        if after != NONE {
            self.previous[after as usize] = before;
        }
    }

    /// The arc that saves most in the next row that has one that saves. `None` when nothing saves: it is optimal.
    fn entering(&mut self) -> Option<(u32, u32)> {
        for _ in 0..self.rows {
            let row = self.at;
            let costs = &self.cost[row * self.stride..(row + 1) * self.stride];
            let least = least_difference(costs, &self.level);
            if least + (self.potential[row] as f64) < 0.0 {
                let mut arcs = costs.iter().zip(&self.level);
                if let Some(column) = arcs.position(|(cost, level)| cost - level == least) {
                    // The next search goes on with another row: one row's arcs tend to undo each other.
                    self.at = (row + 1) % self.rows;
                    return Some((row as u32, (self.rows + column) as u32));
                }
            }
            self.at = (row + 1) % self.rows;
        }
        None
    }

    /// Brings the arc `row → column` into the tree, and the one out that empties first.
    fn pivot(&mut self, row: u32, column: u32) {
        // The flow goes from the row to the column, up from there to where both meet, and down to the row. What
        // leads the other way loses; the first to be empty leaves. Which of equals, is what prevents cycling.
        let (mut a, mut b) = (row, column);
        let mut least = u64::MAX;
        let (mut out, mut out_on_row_side) = (NONE, false);
        // The row's side is looked at from below, the first of equals kept; the column's side keeps the last.
        while a != b {
            if self.depth[a as usize] >= self.depth[b as usize] {
                let n = a as usize;
                if self.up[n] && self.flow[n] < least {
                    (least, out, out_on_row_side) = (self.flow[n], a, true);
                }
                a = self.parent[n];
            } else {
                b = self.parent[b as usize];
            }
        }
        let join = a;
        let mut b = column;
        while b != join {
            let n = b as usize;
            if !self.up[n] && self.flow[n] <= least {
                (least, out, out_on_row_side) = (self.flow[n], b, false);
            }
            b = self.parent[n];
        }
        debug_assert!(out != NONE, "a cycle of nothing but gains would be endless");
        if out == NONE {
            return;
        }
        if least > 0 {
            for (mut n, row_side) in [(row, true), (column, false)] {
                while n != join {
                    let i = n as usize;
                    // On the row's side the flow comes down, on the column's side it goes up.
                    if self.up[i] == row_side {
                        self.flow[i] -= least;
                    } else {
                        self.flow[i] += least;
                    }
                    n = self.parent[i];
                }
            }
        }
        // The part below the leaving arc hangs from the entering one now: what was above it there, is below it.
        let (mut node, mut parent) = if out_on_row_side {
            (row, column)
        } else {
            (column, row)
        };
        let (mut up, mut flow) = (out_on_row_side, least);
        loop {
            let n = node as usize;
            let (above, above_up, above_flow) = (self.parent[n], self.up[n], self.flow[n]);
            self.detach(node);
            self.attach(node, parent, up, flow);
            if node == out {
                break;
            }
            (parent, node, up, flow) = (node, above, !above_up, above_flow);
        }
        // Depths and potentials of all that moved, from the top of it down.
        let top = if out_on_row_side { row } else { column };
        self.stack.clear();
        self.stack.push(top);
        while let Some(node) = self.stack.pop() {
            let mut child = self.first_child[node as usize];
            while child != NONE {
                let c = child as usize;
                self.depth[c] = self.depth[node as usize] + 1;
                let cost = self.arc_cost(child, node);
                let above = self.potential[node as usize];
                self.lift(c, if self.up[c] { above - cost } else { above + cost });
                self.stack.push(child);
                child = self.next[c];
            }
        }
    }

    fn solution(&self, problem: &Problem, steps: u32) -> Solution {
        let supplies = problem.supply.len();
        let mut out = Solution {
            unserved: vec![0; problem.demand.len()],
            steps,
            ..Solution::default()
        };
        for node in 0..self.root() {
            let parent = self.parent[node as usize];
            let units = self.flow[node as usize];
            if units == 0 || parent == self.root() {
                continue;
            }
            let (row, column) = if (node as usize) < self.rows {
                (node, parent)
            } else {
                (parent, node)
            };
            let column = column as usize - self.rows;
            if row as usize == problem.demand.len() {
                continue;
            }
            let cost = self.cost[row as usize * self.stride + column] as i64;
            out.cost += i128::from(cost) * i128::from(units);
            if column == supplies {
                out.unserved[row as usize] += units;
            } else {
                out.flow.push((row, column as u32, units));
            }
        }
        out.flow.sort_unstable();
        // The slack row reaches every column for nothing: what lies between the two potentials is the price.
        let slack = self.potential[self.rows - 1];
        let prices = &self.potential[self.rows..self.rows + supplies];
        out.prices = prices.iter().map(|p| (slack - *p).clamp(0, COST_MAX)).collect();
        out
    }
}

/// The least `cost - level`. Written so that the compiler makes vectors of it: no branch.
fn least_difference(costs: &[f64], levels: &[f64]) -> f64 {
    let mut least = [f64::INFINITY; LANES];
    for (c, l) in costs.chunks_exact(LANES).zip(levels.chunks_exact(LANES)) {
        for i in 0..LANES {
            let difference = c[i] - l[i];
            least[i] = if difference < least[i] {
                difference
            } else {
                least[i]
            };
        }
    }
    least.iter().copied().fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a solution must be, whoever found it: feasible, and priced so that nothing could be cheaper.
    fn check(problem: &Problem, solution: &Solution) {
        let supplies = problem.supply.len();
        let mut served = solution.unserved.clone();
        let mut used = vec![0u64; supplies];
        let mut cost = 0i128;
        for (row, column, units) in &solution.flow {
            let (row, column) = (*row as usize, *column as usize);
            let unit = problem.cost[row * supplies + column];
            assert_ne!(unit, FORBIDDEN);
            served[row] += units;
            used[column] += units;
            cost += i128::from(unit) * i128::from(*units);
        }
        assert_eq!(served, problem.demand);
        for (column, units) in used.iter().enumerate() {
            assert!(*units <= problem.supply[column]);
            assert!(
                *units == problem.supply[column] || solution.prices[column] == 0,
                "spare has no price"
            );
        }
        for (row, units) in solution.unserved.iter().enumerate() {
            cost += i128::from(problem.unserved[row]) * i128::from(*units);
        }
        assert_eq!(cost, solution.cost);
        // Weak duality: no solution costs less than the best each row could do at these prices, less their worth.
        let dual: i128 = (0..problem.demand.len())
            .map(|row| {
                let costs = &problem.cost[row * supplies..(row + 1) * supplies];
                let best = costs
                    .iter()
                    .zip(&solution.prices)
                    .filter(|(c, _)| **c != FORBIDDEN);
                let best = best.map(|(c, p)| c + p).min().unwrap_or(i64::MAX);
                i128::from(best.min(problem.unserved[row])) * i128::from(problem.demand[row])
            })
            .sum::<i128>()
            - (0..supplies)
                .map(|c| i128::from(solution.prices[c]) * i128::from(problem.supply[c]))
                .sum::<i128>();
        assert_eq!(dual, solution.cost, "the dual proves it optimal");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("KAREZ_LONG").is_some() { 20_000 } else { 400 }))]

        #[test]
        fn every_solution_is_proved_optimal_by_its_prices(
            demand in proptest::collection::vec(0..50u64, 1..12),
            supply in proptest::collection::vec(0..50u64, 1..12),
            seed in any::<u64>(),
        ) {
            let mut state = seed;
            let mut draw = |end: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % end
            };
            let cost = (0..demand.len() * supply.len())
                .map(|_| if draw(4) == 0 { FORBIDDEN } else { draw(30) as i64 })
                .collect();
            let unserved = demand.iter().map(|_| draw(200) as i64).collect();
            let problem = Problem { demand, supply, cost, unserved };
            let solution = solve(&problem, 100_000).unwrap();
            check(&problem, &solution);
        }
    }

    #[test]
    fn capacity_is_told_apart_by_price() {
        let all = [(30, 1), (10, 2), (20, 0), (10, 3), (40, 4)];
        assert_eq!(by_price(all, 3), [(10, 5), (30, 1), (40, 4)]);
        assert_eq!(
            by_price(all, 2),
            [(10, 5), (38, 5)],
            "mean of 30 and four times 40"
        );
        assert_eq!(by_price(all, 1), [(24, 10)]);
        assert_eq!(by_price([], 4), []);
        assert!(by_price((0..1_000).map(|i| (i * 7 % 501, i % 5)), 16).len() <= 16);
        assert_eq!((tiers(10), tiers(700), tiers(0), tiers(5_000)), (16, 4, 16, 1));
    }

    #[test]
    fn a_deadline_that_is_missed_gives_nothing() {
        let problem = Problem {
            demand: vec![5, 5],
            supply: vec![5, 5],
            cost: vec![1, 2, 1, 9],
            unserved: vec![100, 100],
        };
        assert!(solve(&problem, 0).is_none());
        let solution = solve(&problem, 100).unwrap();
        assert_eq!(solution.cost, 15);
        check(&problem, &solution);
    }

    #[test]
    fn nothing_wanted_or_nothing_there_is_no_error() {
        for (demand, supply) in [(vec![], vec![]), (vec![3], vec![]), (vec![], vec![3])] {
            let unserved = vec![7; demand.len()];
            let solution = solve(
                &Problem {
                    demand,
                    supply,
                    cost: vec![],
                    unserved,
                },
                10,
            )
            .unwrap();
            assert!(solution.flow.is_empty());
        }
    }
}
