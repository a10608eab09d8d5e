(function () {
  const plots = Array.from(document.querySelectorAll('.plot'));
  const style = function (name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); };
  const colours = function () {
    return {'font.color': style('--text'), 'font.family': getComputedStyle(document.body).fontFamily};
  };
  plots.forEach(function (plot) {
    const figure = JSON.parse(document.getElementById(plot.id + '-data').textContent);
    Object.assign(figure.layout.font, {color: style('--text'), family: getComputedStyle(document.body).fontFamily});
    Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
  });
  window.addEventListener('beforeprint', function () {  // paper is white, and narrower or wider than the window
    plots.forEach(function (plot) { Plotly.relayout(plot, {width: 690, 'font.color': '#1c2127'}); });
  });
  window.addEventListener('afterprint', function () {
    plots.forEach(function (plot) { Plotly.relayout(plot, Object.assign({width: null, autosize: true}, colours())); });
  });
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', function () {
    plots.forEach(function (plot) { Plotly.relayout(plot, colours()); });
  });
})();
